"""Where a chat template without generation tags puts each assistant turn: found by writing anchors into the text.

The conversation is rendered twice: as it is, and with every message's text between private-use
characters that carry the message's number. Without them, the second render must equal the first,
so the anchors stand exactly where the texts do, whatever the template is.

A turn begins after its header: what the template writes as generation prompt, without the opening of a
thinking block, which is the assistant's. Templates without a generation prompt (Mistral's) are asked
once, with small conversations, how a plain turn, a tool call and a thinking block begin. A turn ends with
the first control token after its text that doesn't belong inside a turn.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2

ANCHOR_NUMBER, ANCHOR_START, ANCHOR_END = "\ue0f2", "\ue0f3", "\ue0f4"  # NUMBER 3 START text END
ANCHOR = re.compile(f"{ANCHOR_NUMBER}(\\d+){ANCHOR_START}|{ANCHOR_END}")
THINKING_TAG = re.compile(r"(</?think>)")
WORD = re.compile(r"\S(?:.*\S)?", re.DOTALL)
PROBE_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "d", "parameters": {}}}
PROBE_CALL = {"id": "aBc123xYz", "type": "function", "function": {"name": "probe_tool", "arguments": {"key": "value"}}}
Render = Callable[..., str]  # (messages, tools, template_kwargs, add_generation_prompt=False) -> text
Span = tuple[int, int]  # characters [start, end) of the rendered text


class TurnNotFound(ValueError):
    """Why the turns of a conversation can't be told."""


@dataclass
class _Anchor:
    """Where one text of message `number` stands in the render."""

    number: int
    start: int
    end: int


class TurnFinder:
    """Finds assistant turns in the renders of one template.

    Args:
        render: renders the template; may raise what templates raise.
        control: matches a control token that the template wrote.
        eos_token: ends the last turn of a row where the template doesn't.
    """

    def __init__(self, render: Render, control: re.Pattern[str], eos_token: str | None):
        self.render = render
        self.control = control
        self.eos_token = eos_token
        self.header = self._generation_prompt()
        self.openers: list[str] = []  # with what tool calls and thinking begin
        self.plain_ends: set[str] = set()  # the tokens that end plain turns
        self.inside: set[str] = set()  # control tokens inside turns
        self._learn()

    # ---- what the template is like --------------------------------------------------------------

    def _generation_prompt(self) -> str:
        """The header of an assistant turn, as a generation prompt; empty where the template has none."""
        messages = [{"role": "user", "content": "question"}]
        try:
            without = self.render(messages, None, None)
            prompted = self.render(messages, None, None, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError):
            return ""
        start = next((i for i, (a, b) in enumerate(zip(without, prompted, strict=False)) if a != b), len(without))
        for match in self.control.finditer(prompted):
            if match.start() < start < match.end():  # the two differ inside a token
                start = match.start()
        return prompted[start:].partition("<think>")[0]

    def _learn(self) -> None:
        """How turns begin and end, from conversations that most templates take."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        thinking = {**answer, "reasoning_content": "reasons"}
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        result = {"role": "tool", "content": "result", "name": "probe_tool", "tool_call_id": PROBE_CALL["id"]}
        for anchors, text in self._probe([question, answer, question, answer], None):
            for number in (1, 3):  # in the middle and at the end
                position = max((a.end for a in anchors if a.number == number), default=len(text))
                end = self.control.search(text, position, self._next(anchors, number, text))
                self.plain_ends |= {end[0]} if end else set()
        plain = next(iter(self._probe([question, answer], None)), None)
        if plain is None:
            return
        anchors, text = plain
        begin = text[anchors[0].end : anchors[1].start].rstrip(" ")  # of a plain turn, after the question
        for messages, tools in (([question, thinking], None), ([question, call, result, answer], [PROBE_TOOL])):
            for anchors, text in self._probe(messages, tools):
                turn = [a for a in anchors if a.number == 1]
                if not turn:
                    continue
                leading = text[anchors[0].end : turn[0].start]
                if leading.startswith(begin):
                    opener = leading[len(begin) :].partition("probe_tool")[0]
                    self.openers += [opener] if opener.strip() else []
                if tools:
                    limit = self._next(anchors, 1, text)
                    end = self._end_of_turn(text, turn[-1].end, limit)
                    inside = self.control.finditer(text, turn[0].start - len(leading) + len(begin), end or limit)
                    self.inside |= {m[0] for m in inside if end is None or m.end() < end}

    def _probe(self, messages: list[dict], tools: list | None) -> list[tuple[list[_Anchor], str]]:
        """Anchors and text of a small conversation; nothing where the template refuses it."""
        try:
            text, anchors = self._anchored(messages, tools, None)
        except (jinja2.TemplateError, TypeError, ValueError):
            return []
        return [(anchors, text)] if {0, 1} <= {a.number for a in anchors} else []

    # ---- the turns of a conversation --------------------------------------------------------------

    def find(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> tuple[str, list[Span]]:
        """The rendered text and the span of every assistant turn.

        Raises:
            TurnNotFound: with the reason.
        """
        text, anchors = self._anchored(messages, tools, template_kwargs)
        if self.render(messages, tools, template_kwargs) != text:
            raise TurnNotFound("the template changes with the text of the messages")
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = [a for a in anchors if a.number == number]
            if not turn:
                raise TurnNotFound(f"the template doesn't show message {number}, an assistant turn")
            if _is_anchored_by_name(message):  # a template may repeat the name beside the tool's result
                turn = turn[:1]
            first, last = anchors.index(turn[0]), anchors.index(turn[-1])
            if any(a.number != number for a in anchors[first : last + 1]):
                raise TurnNotFound(f"the text of message {number} is shown in several places")
            before = max([a.end for a in anchors[:first]] + [span[1] for span in spans], default=0)
            start = self._start_of_turn(text, before, turn[0].start, message)
            limit = anchors[last + 1].start if last + 1 < len(anchors) else len(text)
            end = self._end_of_turn(text, turn[-1].end, limit)
            if end is None:
                if limit < len(text) or text[turn[-1].end :].strip() or self.eos_token is None:
                    raise TurnNotFound(f"no end-of-turn token follows message {number}")
                text = text.rstrip() if turn[-1].end <= len(text.rstrip()) else text[: turn[-1].end]
                text += self.eos_token
                end = len(text)
            spans.append((start, end))
        return text, spans

    def _start_of_turn(self, text: str, before: int, anchor: int, message: dict) -> int:
        leading = text[before:anchor]
        if self.header and self.header in leading:
            return before + leading.rindex(self.header) + len(self.header)
        found = [leading.index(opener) for opener in self.openers if opener in leading]
        if found:
            return before + min(found)
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise TurnNotFound("the template has no header before a tool call or a thinking block")
        if "<think>" in (message.get("content") or ""):
            leading = leading.partition("<think>")[0]
        return before + len(leading.rstrip(" "))

    def _end_of_turn(self, text: str, position: int, limit: int) -> int | None:
        """The end of the token that ends a turn whose last text ends at `position`."""
        tokens = [m for m in self.control.finditer(text, position, limit) if m[0] not in self.inside]
        end = next((m for m in tokens if m[0] in self.plain_ends), tokens[0] if tokens else None)
        return end.end() if end else None

    @staticmethod
    def _next(anchors: list[_Anchor], number: int, text: str) -> int:
        """Where the text of the messages after message `number` starts."""
        return next((a.start for a in anchors if a.number > number), len(text))

    def _anchored(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> tuple[str, list[_Anchor]]:
        """The rendered text, without anchors, and where they were."""
        marked = [_with_anchors(message, number) for number, message in enumerate(messages)]
        text = self.render(marked, tools, template_kwargs)
        parts: list[str] = []
        anchors: list[_Anchor] = []
        position = length = 0
        for match in ANCHOR.finditer(text):
            parts.append(text[position : match.start()])
            length += match.start() - position
            position = match.end()
            if match[1] is not None:
                anchors.append(_Anchor(int(match[1]), length, length))
            elif anchors:
                anchors[-1].end = length
        return "".join([*parts, text[position:]]), anchors


def _is_anchored_by_name(message: dict) -> bool:
    return "tool_calls" in message and not (
        message.get("content") or message.get("reasoning_content") or _arguments_text(message)
    )


def _arguments_text(message: dict) -> bool:
    """Whether a text in the arguments of the message's tool calls can hold an anchor."""
    return any(_has_text((call.get("function") or call).get("arguments")) for call in message.get("tool_calls") or [])


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    if isinstance(value, list):
        return any(map(_has_text, value))
    return isinstance(value, str) and WORD.search(value) is not None


def _with_anchors(message: dict, number: int) -> dict:
    """A message whose texts are anchored; white space and thinking tags, which templates look at, stay outside."""
    anchored = dict(message)
    for key in ("reasoning_content", "content"):
        if message.get(key):
            parts = THINKING_TAG.split(message[key])
            anchored[key] = "".join(p if i % 2 else _anchor(p, number) for i, p in enumerate(parts))
    if message["role"] != "assistant":
        return anchored
    if message.get("tool_calls"):
        by_name = _is_anchored_by_name(message)
        anchored["tool_calls"] = [_call_with_anchors(call, number, by_name) for call in message["tool_calls"]]
    elif not (message.get("content") or "").strip() and not message.get("reasoning_content"):
        anchored["content"] = f"{ANCHOR_NUMBER}{number}{ANCHOR_START}{ANCHOR_END}" + message["content"]
    return anchored


def _call_with_anchors(call: dict, number: int, by_name: bool) -> dict:
    function = call.get("function") or call
    if by_name:
        function = {**function, "name": _anchor(function["name"], number)}
    else:
        function = {**function, "arguments": _anchored_value(function.get("arguments"), number)}
    return {**call, "function": function} if "function" in call else function


def _anchored_value(value: Any, number: int) -> Any:
    if isinstance(value, str):
        return _anchor(value, number)
    if isinstance(value, dict):
        return {_anchor(key, number): _anchored_value(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_anchored_value(item, number) for item in value]
    return value


def _anchor(text: str, number: int) -> str:
    return WORD.sub(lambda m: f"{ANCHOR_NUMBER}{number}{ANCHOR_START}{m[0]}{ANCHOR_END}", text, count=1)
