"""Verify that a rendered text shows all of its conversation, and each assistant turn inside its span."""

import json
from typing import Any

from dft.chat.control_tokens import MARKS
from dft.chat.template import Span
from dft.reading.messages import function_of
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text


def verify(text: str, spans: list[Span], messages: list[dict]) -> None:
    """Checks that every assistant turn is inside its span, in order, and every other message is in the text.

    Raises:
        RowError: with what is missing.
    """
    turns = [m for m in messages if m["role"] == "assistant"]
    if len(turns) != len(spans):
        raise RowError("unverified_mask", f"{len(turns)} assistant turns, {len(spans)} found in the render")
    position = 0
    for turn, (start, end) in zip(turns, spans, strict=True):
        if start < position:
            raise RowError("unverified_mask", "two assistant turns overlap in the render")
        position = end
        _verify_turn(turn, text[start:end])
    for message in messages:
        content = (message.get("content") or "").strip()
        if message["role"] != "assistant" and not _is_shown(content, text):
            raise RowError("message_not_rendered", f"the template leaves out a {message['role']} message")


def not_rendered(text: str, messages: list[dict], tools: list | None) -> tuple[str, ...]:
    """The columns that the conversation has and the chat template never shows."""
    shown = {
        "reasoning_content": [m["reasoning_content"].strip() for m in messages if m.get("reasoning_content")],
        "tools": [str(function_of(tool).get("name")) for tool in tools or []],
    }
    if any(shown.values()):
        text = MARKS.sub("", text)
    return tuple(name for name, parts in shown.items() if parts and not any(part in text for part in parts))


def _verify_turn(turn: dict, text: str) -> None:
    """Checks that the text of a span has the content of its turn and all its tool calls, in order, with arguments."""
    content = (turn.get("content") or "").strip()
    calls = turn.get("tool_calls") or []
    # templates of reasoning models leave the thinking of earlier turns out
    answer = content.split("</think>")[-1].strip()
    if content not in text and (answer not in text or not (answer or calls)):
        raise RowError("unverified_mask", f"an assistant turn is not in the render: {content[:60]!r}")
    text = text.replace(content, "", 1)
    position = 0
    for function in map(function_of, calls):
        name = function.get("name", "")
        found = text.find(name, position)
        if found < 0 or not all(_is_shown(value, text) for value in _leaves(function.get("arguments"))):
            raise RowError("unverified_mask", f"the call of tool {name!r} is not in its turn, or not whole")
        position = found + len(name)


def _is_shown(value: Any, text: str) -> bool:
    """Whether a value is in the text: as it is, as JSON, or, if it is JSON itself, by all its parts."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    if any(form in text for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])):
        return True
    try:
        parsed = decode_text(value)
    except RowError:
        return False
    return isinstance(parsed, dict | list) and all(_is_shown(leaf, text) for leaf in _leaves(parsed))


def _leaves(value: Any) -> list[Any]:
    """The texts, numbers and truth values inside a JSON value."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]
