"""Verify that a rendered text shows all of its conversation, and each assistant turn inside its span."""

import json
import re
from typing import Any

from dft.chat.control_tokens import MARK_END, MARK_START, MARKS
from dft.chat.template import Span
from dft.reading.messages import REASONING_KEYS, function_of
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text

OPENING, CLOSING = (f"{MARK_START}?<{slash}think>{MARK_END}?" for slash in ("", "/"))
THINKING_BLOCK = re.compile(rf"\s*{OPENING}(.*?){CLOSING}(.*)", re.DOTALL)
UNOPENED_BLOCK = re.compile(rf"((?:(?!<think>).)*?)\n[ \t]*{CLOSING}[ \t]*(?=\n|\Z)(.*)", re.DOTALL)


def verify(text: str, spans: list[Span], messages: list[dict]) -> list[bool]:
    """Checks that every assistant turn is inside its span, in order, and every other message is in the text.

    Returns:
        for each turn whether its thinking is left out; templates do so with the thinking of earlier turns.

    Raises:
        RowError: with what is missing.
    """
    turns = [m for m in messages if m["role"] == "assistant"]
    if len(turns) != len(spans):
        raise RowError("unverified_mask", f"{len(turns)} assistant turns, {len(spans)} found in the render")
    position = 0
    lacks_thinking = []
    for turn, (start, end) in zip(turns, spans, strict=True):
        if start < position:
            raise RowError("unverified_mask", "two assistant turns overlap in the render")
        position = end
        lacks_thinking.append(_verify_turn(turn, text[start:end]))
    for message in messages:
        content = (message.get("content") or "").strip()
        if message["role"] != "assistant" and not _is_shown(content, text):
            raise RowError("message_not_rendered", f"the template leaves out a {message['role']} message")
    return lacks_thinking


def tools_not_rendered(text: str, tools: list | None) -> bool:
    """Whether the conversation has tools, and the render none of their names."""
    names = [str(function_of(tool).get("name")) for tool in tools or []]
    if not names:
        return False
    text = MARKS.sub("", text)
    return not any(name in text for name in names)


def split_thinking(content: str) -> tuple[str, str] | None:
    """The thinking at the beginning of a content and the answer behind it; None for a content without such a block.

    A block without its opening tag counts where the closing one has a line of its own. In other places "</think>" is
    a word of the answer.
    """
    match = THINKING_BLOCK.match(content) or UNOPENED_BLOCK.match(content)
    return (match[1].strip(), match[2].strip()) if match else None


def only_thinks(turn: dict) -> bool:
    """Whether a turn has no answer and no tool call beside its thinking."""
    content = turn["content"].strip()
    _, answer = split_thinking(content) or ("", content)
    return not answer and not turn.get("tool_calls")


def _verify_turn(turn: dict, shown: str) -> bool:
    """Checks that a span has the content of its turn and all its tool calls; returns whether it lacks its thinking."""
    content = (turn.get("content") or "").strip()
    thinking, answer = ("", content) if content in shown else split_thinking(content) or ("", content)
    if answer not in shown:
        raise RowError("unverified_mask", f"an assistant turn is not in the render, or not whole: {content[:60]!r}")
    lacks_thinking = any(text not in shown for text in (thinking, *_reasoning(turn)))
    text = shown.replace(content, "", 1)
    position = 0
    for function in map(function_of, turn.get("tool_calls") or []):
        name = function.get("name", "")
        found = text.find(name, position)
        if found < 0 or not all(_is_shown(value, text) for value in _leaves(function.get("arguments"))):
            raise RowError(
                "unverified_mask",
                f"the chat template doesn't show the call of tool {name!r}, or not whole: give one that does with "
                "--chat_template FILE",
            )
        position = found + len(name)
    return lacks_thinking


def _reasoning(turn: dict) -> list[str]:
    return [turn[key].strip() for key in REASONING_KEYS if isinstance(turn.get(key), str)]


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
