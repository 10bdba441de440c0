"""Write anchors around the texts of messages, render them, and read back where each text stands.

Anchors are private-use characters that carry the number of the message. Taken out again, they leave the text that
the template renders without them, unless the template looks at the texts.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from dft.chat.template import ChatTemplate
from dft.reading.messages import REASONING_KEYS, is_empty

NUMBER, START, END = "\ue0f2", "\ue0f3", "\ue0f4"  # an anchored text is NUMBER 3:content START text END
ANCHOR = re.compile(f"{NUMBER}(\\d+):(\\w+){START}|{END}")
THINKING_TAG = re.compile(r"(</?think>)")
WORDS = re.compile(r"\S(?:.*\S)?", re.DOTALL)  # a text without the white space around it


@dataclass
class Anchor:
    """Where one text of message `number` stands in the rendered text: characters [start, end)."""

    number: int
    part: str  # "content", "reasoning", or the index of a tool call; "name" and that index if its name is anchored
    start: int
    end: int


def render_anchored(
    template: ChatTemplate,
    messages: list[dict],
    tools: list | None = None,
    template_kwargs: dict | None = None,
    empty_turns: bool = True,
) -> tuple[str, list[Anchor]]:
    """The rendered text, without anchors, and where they stood, in the order of the text.

    Args:
        empty_turns: write anchors into assistant turns without any text, too.

    Raises:
        TEMPLATE_ERRORS: the template refuses the conversation.
    """
    first: dict[str, int] = {}  # equal messages get equal anchors: some templates look for the last question
    anchored = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            number = first.setdefault(json.dumps(message, default=str), number)
        anchored.append(message if not empty_turns and is_empty(message) else _with_anchors(message, number))
    return _read_anchors(template.render(anchored, tools, template_kwargs))


def _read_anchors(text: str) -> tuple[str, list[Anchor]]:
    parts: list[str] = []
    anchors: list[Anchor] = []
    position = length = 0  # in the text with anchors, and in the one without
    for match in ANCHOR.finditer(text):
        parts.append(text[position : match.start()])
        length += match.start() - position
        position = match.end()
        if match[1] is not None:
            anchors.append(Anchor(int(match[1]), match[2], length, length))
        elif anchors:
            anchors[-1].end = length
    return "".join([*parts, text[position:]]), anchors


def start_of_next(anchors: list[Anchor], number: int, text: str) -> int:
    """Where the text of the messages after message `number` starts; the end of the text if there is none."""
    return next((a.start for a in anchors if a.number > number), len(text))


# ---- writing ------------------------------------------------------------------------------------


def _with_anchors(message: dict, number: int) -> dict:
    """Writes anchors around the texts of a message, but not around white space and thinking tags.

    Templates test for these, so with anchors around them they would render another text.
    """
    anchored = dict(message)
    if message["role"] != "assistant":
        anchored["content"] = _anchor(message.get("content") or "", number)
        return anchored
    for key, part in (*((key, "reasoning") for key in REASONING_KEYS), ("content", "content")):
        if message.get(key):
            pieces = THINKING_TAG.split(message[key])
            anchored[key] = "".join(
                p if i % 2 or not p.strip() else _anchor(p, number, part) for i, p in enumerate(pieces)
            )
    if message.get("tool_calls"):
        calls = enumerate(message["tool_calls"])
        anchored["tool_calls"] = [_call_with_anchors(call, number, index) for index, call in calls]
    elif not (message.get("content") or "").strip():
        anchored["content"] = _anchor(message.get("content") or "", number)
    return anchored


def _call_with_anchors(call: dict, number: int, index: int) -> dict:
    function = call.get("function") or call
    if _has_text(function.get("arguments")):
        function = {**function, "arguments": _value_with_anchors(function["arguments"], number, str(index))}
    else:
        function = {**function, "name": _anchor(function["name"], number, f"name{index}")}
    return {**call, "function": function} if "function" in call else function


def _has_text(value: Any) -> bool:
    """Whether the arguments of a call have a text, or a key, that can be anchored."""
    if isinstance(value, dict):
        return bool(value)
    if isinstance(value, list):
        return any(map(_has_text, value))
    return isinstance(value, str) and WORDS.search(value) is not None


def _value_with_anchors(value: Any, number: int, part: str) -> Any:
    if isinstance(value, str):
        return _anchor(value, number, part) if value.strip() else value
    if isinstance(value, dict):
        return {
            (_anchor(key, number, part) if key.strip() else key): _value_with_anchors(item, number, part)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_value_with_anchors(item, number, part) for item in value]
    return value


def _anchor(text: str, number: int, part: str = "content") -> str:
    """`text` with anchors around its words; before its white space where it has none."""
    start = f"{NUMBER}{number}:{part}{START}"
    if not text.strip():
        return f"{start}{END}{text}"
    return WORDS.sub(lambda match: f"{start}{match[0]}{END}", text, count=1)
