"""Whether a chat template has shown all of a conversation, each turn in its place."""

import json
from typing import Any

from dft.chat.example import RowError
from dft.chat.text_encoder import MARKS
from dft.chat.turn_finder import Span
from dft.reading.formats import function_of
from dft.reading.strict_json import MalformedRow, decode


def verify(text: str, spans: list[Span], messages: list[dict]) -> None:
    """Checks that every assistant turn has its span, in order, with its text, and every other text is in the render.

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
        span = text[start:end]
        content = (turn.get("content") or "").strip()
        # reasoning models drop the thinking of earlier turns from the render
        answer = content.split("</think>")[-1].strip()
        if content not in span and (answer not in span or not (answer or turn.get("tool_calls"))):
            raise RowError("unverified_mask", f"an assistant turn is not in the render: {content[:60]!r}")
        _verify_calls(turn.get("tool_calls") or [], span.replace(content, "", 1))
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


def _verify_calls(calls: list[dict], text: str) -> None:
    """Every tool call is in the text, in order, with its arguments."""
    position = 0
    for call in calls:
        name = function_of(call).get("name", "")
        found = text.find(name, position)
        if found < 0 or not all(_is_shown(value, text) for value in _leaves(function_of(call).get("arguments"))):
            raise RowError("unverified_mask", f"the call of tool {name!r} is not in its turn, or not whole")
        position = found + len(name)


def _is_shown(value: Any, text: str) -> bool:
    """Whether a value stands in the text: as it is, as in JSON, or, where it is JSON, by its parts."""
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    if any(form in text for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])):
        return True
    try:
        parsed = decode(value)
    except MalformedRow:
        return False
    return isinstance(parsed, dict | list) and all(_is_shown(leaf, text) for leaf in _leaves(parsed))


def _leaves(value: Any) -> list[Any]:
    """The texts, numbers and truth values inside a JSON value."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]
