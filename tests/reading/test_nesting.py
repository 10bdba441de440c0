"""The limit of nesting is the same in every place of a row and on every machine, whatever the stack holds."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from dft.reading.rows import Conversation, RejectedRow
from dft.reading.strict_json import MAX_NESTING, is_nested_too_deeply
from tests.reading.test_reading import OTHER, ROW, chat, line, read, write


def nested(levels: int) -> list | dict:
    """Lists and objects in turn inside each other, as many as `levels`."""
    value: list | dict = {}
    for i in range(levels - 1):
        value = [value] if i % 2 else {"key": value}
    return value


def calling(arguments: object) -> dict:
    """A row with a tool call; five levels are around its arguments."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}


def function_call(levels: int) -> dict:
    text = json.dumps({"name": "f", "arguments": nested(levels - 1)})
    return {"conversations": [{"from": "function_call", "value": text}]}


PLACES = {  # place: a row that is nested so deeply there, and words of the error
    "tools": (lambda levels: chat(tools=[{"x": nested(levels - 2)}]), "'tools' is nested"),
    "template arguments": (lambda levels: chat(chat_template_kwargs={"x": nested(levels - 1)}), "_kwargs' is nested"),
    "message": (lambda levels: {"messages": [{**chat()["messages"][1], "x": nested(levels - 2)}]}, "'messages' is"),
    "arguments": (lambda levels: calling(nested(levels - 5)), "'messages' is nested"),
    "prompt": (
        lambda levels: {"prompt": [{"role": "user", "content": "Q", "x": nested(levels - 2)}], "completion": []},
        "'prompt' is nested",
    ),
    "tools as text": (lambda levels: chat(tools=json.dumps([{"x": nested(levels - 2)}])), "'tools' is nested"),
    "arguments as text": (lambda levels: calling(json.dumps(nested(levels))), "arguments of 'f' is nested"),
    "function call as text": (function_call, "[0]: the function call is nested"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("place", PLACES)
def test_the_limit_is_accepted_and_one_level_more_is_rejected(tmp_path, place, suffix):
    make, words = PLACES[place]
    for levels in (MAX_NESTING, MAX_NESTING + 1):
        contents = [ROW if place != "prompt" else line({"prompt": "Q", "completion": "A"}), line(make(levels))]
        if place == "function call as text":
            contents[0] = line({"conversations": [{"from": "human", "value": "Q"}]})
        contents.append(contents[0])
        whole = b"\n".join(contents) if suffix == ".jsonl" else b"[" + b",\n".join(contents) + b"]"
        first, row, last = read(write(tmp_path / f"a{suffix}", whole))
        assert isinstance(first, Conversation)
        assert isinstance(last, Conversation)
        if levels > MAX_NESTING:
            assert isinstance(row, RejectedRow)
            assert (row.reason, row.line, row.is_malformed) == ("malformed_row", 2, True)
            assert words in row.detail
            assert f"nested too deeply: at most {MAX_NESTING}" in row.detail
            assert row.row == contents[1].decode()
        elif place == "prompt":
            assert "'completion' must be a list of messages" in row.detail  # the next check: nesting is no problem
        else:
            assert isinstance(row, Conversation), row.detail


@pytest.mark.parametrize("place", ["tools as text", "arguments as text"])
def test_the_limit_holds_for_json_in_texts_of_parquet(tmp_path, place):
    """Parquet limits the nesting of its own columns."""
    make, words = PLACES[place]
    rows = [make(levels) for levels in (MAX_NESTING, MAX_NESTING + 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    accepted, rejected = read(tmp_path / "a.parquet")
    assert isinstance(accepted, Conversation)
    assert rejected.reason == "malformed_row"
    assert words in rejected.detail


def test_columns_that_are_not_used_may_be_nested_deeper(tmp_path):
    (row,) = read(write(tmp_path / "a.jsonl", line(chat(other=nested(MAX_NESTING + 100)))))
    assert isinstance(row, Conversation)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"text": "[" * 1000}),  # brackets inside a text are no levels
        json.dumps({"text": '"' + "{" * 1000}),
        json.dumps([[]] * 1000),
        "f(" + "[" * 1000,  # not JSON, so nothing will parse it
    ],
)
def test_arguments_with_many_brackets_that_are_not_nested_are_accepted(tmp_path, text):
    (row,) = read(write(tmp_path / "a.jsonl", line(calling(text))))
    assert row.messages[0]["tool_calls"][0]["function"]["arguments"] == text


@pytest.mark.parametrize("depth", [*range(900, 1000, 7), 100_000])
@pytest.mark.parametrize("column", ["messages", "other"])
def test_depths_near_the_limit_of_the_parser_raise_nothing(tmp_path, depth, column):
    """How deep the parser can go, and the check for surrogates after it, depends on the interpreter and its stack."""
    value = b"[" * depth + rb'"\ud83d\ude00"' + b"]" * depth
    deep = b'{"%b": %b}' % (column.encode(), value) if column == "messages" else ROW[:-1] + b', "other": %b}' % value
    first, row, last = read(write(tmp_path / "a.jsonl", b"\n".join([ROW, deep, OTHER])))
    assert isinstance(first, Conversation)
    assert isinstance(last, Conversation)
    if column == "messages" or isinstance(row, RejectedRow):
        assert "nested too deeply" in row.detail
    rows = read(write(tmp_path / "a.json", b"[" + b",".join([ROW, deep, OTHER]) + b"]"))
    assert isinstance(rows[0], Conversation)
    assert rows[1].line == 1


def depth_of(value: object) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def test_brackets_are_counted_as_the_parser_would(monkeypatch):
    rng = random.Random(0)

    def random_value(levels: int) -> object:
        if levels == 0 or rng.random() < 0.2:
            return rng.choice(["", "[", "}", '"', "\\", '\\"[{', "a]", 1, None])
        items = [random_value(levels - 1) for _ in range(rng.randrange(3))]
        return {str(rng.choice([i, "[", '"'])): item for i, item in enumerate(items)} if rng.random() < 0.5 else items

    monkeypatch.setattr("dft.reading.strict_json.MAX_NESTING", 3)
    for _ in range(3000):
        value = random_value(6)
        text = json.dumps(value, indent=rng.choice([None, 1]))
        assert is_nested_too_deeply(text) == (depth_of(value) > 3), text
