"""The deepest rows that are accepted can be rendered, marked, anchored and encoded without running out of stack."""

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dft.chat.example import Example
from dft.chat.format import ChatFormat
from dft.reading.formats import RowReader
from dft.reading.rows import Conversation, RawRow, RowError
from dft.reading.strict_json import MAX_NESTING
from tests.chat.families import FAMILIES, tokenizer

SPARE_FRAMES = 400  # Python allows 1000 by default, of which a program may have used many


@contextmanager
def little_stack() -> Iterator[None]:
    """Leaves SPARE_FRAMES frames to what is called inside, whatever is on the stack of this process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + SPARE_FRAMES)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def nested(levels: int, shape: str, leaf: str = "leaf") -> list | dict | str:
    value: list | dict | str = leaf
    for i in range(levels):
        value = [value] if shape == "lists" or (shape == "both" and i % 2) else {"key": value}
    return value


def row(levels: int, shape: str, as_text: bool) -> Conversation:
    """A conversation of so many levels in its tools, its template arguments and its tool call."""
    arguments = {"x": nested(levels - (1 if as_text else 6), shape)}  # five levels are around the arguments
    function = {"name": "f", "arguments": json.dumps(arguments) if as_text else arguments}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call00000", "function": function}]},
        {"role": "tool", "name": "f", "tool_call_id": "call00000", "content": "42"},
        {"role": "assistant", "content": "A"},
    ]
    parameters = {"type": "object", "properties": {"x": nested(levels - 5, shape)}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
    columns = {"messages": messages, "tools": [tool], "chat_template_kwargs": {"x": nested(levels - 1, shape)}}
    conversation = RowReader("a.jsonl", "messages", {}).read(RawRow(1, json.dumps(columns)))
    assert isinstance(conversation, Conversation), conversation.detail
    return conversation


def outcome(result: Example | RowError) -> str:
    return result.reason if isinstance(result, RowError) else "encoded"


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, "built-in"])
def test_rows_at_the_limit_of_nesting_are_treated_like_flat_ones(name, as_text):
    tokens = tokenizer("qwen2.5" if name == "built-in" else name)
    if name == "built-in":
        tokens.chat_template = None
    chat_format = ChatFormat(tokens)
    rows = [row(levels, shape, as_text) for levels in (8, MAX_NESTING) for shape in ("lists", "objects", "both")]
    with little_stack():
        results = chat_format.encode_batch([(r.messages, r.tools, r.template_kwargs) for r in rows])
    assert len(set(map(outcome, results))) == 1
    if name in ("qwen2.5", "llama3", "deepseek_v3", "built-in"):
        assert outcome(results[-1]) == "encoded"
        assert json.dumps(nested(MAX_NESTING - 10, "both"))[:100] in tokens.decode(results[-1].input_ids)


def test_json_in_a_message_is_compared_by_its_parts_up_to_the_limit(tokenizer):
    """The text of a message may be nested without limit, but beyond it a template must show the text as it is."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
        "('part' if m.role == 'user' else m.content) + '<|im_end|>' }}{% endfor %}"
    )
    chat_format = ChatFormat(tokenizer)
    texts = [json.dumps(nested(levels, "lists", "part")) for levels in (MAX_NESTING, MAX_NESTING + 1)]
    texts.append("[" * 100_000 + "]" * 100_000)
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "A"}] for text in texts]
    with little_stack():
        results = chat_format.encode_batch([(chat, None, None) for chat in chats])
    assert list(map(outcome, results)) == ["encoded", "message_not_rendered", "message_not_rendered"]
