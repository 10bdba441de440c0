"""Where a chat template without generation tags puts each assistant turn: found by writing anchors into the text.

The conversation is rendered twice: as it is, and with every message's text between private-use
characters that carry the message's number. Without them, the second render must equal the first,
so the anchors stand exactly where the texts do, whatever the template is.

A turn begins after its header: what the template writes as generation prompt, without the opening of a
thinking block, which is the assistant's. Templates without a generation prompt (Mistral's) are asked
once, with small conversations, how a plain turn, a tool call and a thinking block begin. A turn ends with
the first control token after its text that doesn't belong inside a turn.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2

ANCHOR_NUMBER, ANCHOR_START, ANCHOR_END = "\ue0f2", "\ue0f3", "\ue0f4"  # NUMBER 3 START text END
ANCHOR = re.compile(f"{ANCHOR_NUMBER}(\\d+):(\\w+){ANCHOR_START}|{ANCHOR_END}")
THINKING_TAG = re.compile(r"(</?think>)")
WORD = re.compile(r"\S(?:.*\S)?", re.DOTALL)
PROBE_TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "d", "parameters": {}}}
PROBE_CALL = {"id": "aBc123xYz", "type": "function", "function": {"name": "probe_tool", "arguments": {"key": "value"}}}
# what a template, which is a stranger's program, may raise
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
Render = Callable[..., str]  # (messages, tools, template_kwargs, add_generation_prompt=False) -> text
Span = tuple[int, int]  # characters [start, end) of the rendered text


class TurnNotFound(ValueError):
    """Why the turns of a conversation can't be told."""


@dataclass
class _Anchor:
    """Where one text of message `number` stands in the render.

    `part` is "content", "reasoning", or of a tool call: its index, with "name" before it if its name is anchored.
    """

    number: int
    part: str
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
        self.begin = ""  # what a plain turn follows, where the template has no generation prompt
        self._learn()

    # ---- what the template is like --------------------------------------------------------------

    def _generation_prompt(self) -> str:
        """The header of an assistant turn, as a generation prompt; empty where the template has none."""
        messages = [{"role": "user", "content": "question"}]
        try:
            without = self.render(messages, None, None)
            prompted = self.render(messages, None, None, add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return ""
        start = next((i for i, (a, b) in enumerate(zip(without, prompted, strict=False)) if a != b), len(without))
        for match in self.control.finditer(prompted):
            if match.start() < start < match.end():  # the two differ inside a token
                start = match.start()
        return prompted[start:].partition("<think>")[0].rstrip(" ")

    def _learn(self) -> None:
        """How turns begin and end, from conversations that most templates take."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        thinking = {**answer, "reasoning_content": "reasons"}
        call = {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}
        result = {"role": "tool", "content": "result", "name": "probe_tool", "tool_call_id": PROBE_CALL["id"]}
        for anchors, text in self._probe([question, answer, {**question, "content": "other"}, answer], None):
            closings = []  # what follows the answer in the middle and the one at the end
            for number in (1, 3):
                position = max((a.end for a in anchors if a.number == number), default=len(text))
                closings.append(text[position : self._next(anchors, number, text)])
            # a turn may close with several tokens (Command R's): what both have in common belongs to it
            common = os.path.commonprefix(closings)
            tokens = [m[0] for m in self.control.finditer(common)]
            if tokens:
                self.plain_ends = {self.eos_token if self.eos_token in tokens else tokens[-1]}
            else:
                firsts = (self.control.search(closing) for closing in closings)
                self.plain_ends = {m[0] for m in firsts if m}
        plain = next(iter(self._probe([question, answer], None)), None)
        if plain is None:
            return
        anchors, text = plain
        begin = text[anchors[0].end : anchors[1].start].rstrip(" ")  # of a plain turn, after the question
        tokens = list(self.control.finditer(begin))
        self.begin = begin[tokens[-1].start() :] if tokens else begin
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
        except TEMPLATE_ERRORS:
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
        places: dict[int, list[int]] = {}  # of the anchors of a message
        for place, anchor in enumerate(anchors):
            places.setdefault(anchor.number, []).append(place)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number not in places:
                raise TurnNotFound(f"the template doesn't show message {number}, an assistant turn")
            own = _without_repeated_names(places[number], anchors)
            turn = [anchors[place] for place in own]
            shown = {a.part.removeprefix("name") for a in turn}
            if any(str(i) not in shown for i in range(len(message.get("tool_calls") or []))):
                raise TurnNotFound(f"the template doesn't show every tool call of message {number}")
            first, last = own[0], own[-1]
            if any(a.number != number for a in anchors[first : last + 1]):
                raise TurnNotFound(f"the text of message {number} is shown in several places")
            start = self._start_of_turn(text, anchors[first - 1].end if first else 0, turn[0])
            limit = anchors[last + 1].start if last + 1 < len(anchors) else len(text)
            end = self._end_of_turn(text, turn[-1].end, limit)
            if end is None:
                if number + 1 < len(messages) or self.eos_token is None:
                    raise TurnNotFound(f"no end-of-turn token follows message {number}")
                rest = text[turn[-1].end :]
                if rest.strip() and rest != self._rest_before_question(messages, tools, template_kwargs):
                    raise TurnNotFound(f"no end-of-turn token follows message {number}")
                text += self.eos_token
                end = len(text)
            spans.append((start, end))
        return text, spans

    def _start_of_turn(self, text: str, before: int, anchor: _Anchor) -> int:
        leading = text[before : anchor.start]
        for header in filter(None, (self.header, self.begin)):
            if header in leading:  # a turn of several parts repeats its header: the first is the turn's
                if leading.count(header) > 1 and not self.control.search(header):
                    raise TurnNotFound("the header of a turn is plain text and stands in the tools or elsewhere too")
                return before + leading.index(header) + len(header)
        found = [leading.index(opener) for opener in self.openers if opener in leading]
        if not found and anchor.part != "content":
            raise TurnNotFound("the template has no header before a tool call or a thinking block")
        leading = leading[: min(found)] if found else leading
        tokens = list(self.control.finditer(leading))
        if tokens and not found and THINKING_TAG.sub("", leading[tokens[-1].end() :]).strip():
            raise TurnNotFound("the turn's header is not the one of the generation prompt")
        return before + (tokens[-1].end() if tokens else len(leading.rstrip(" ")))

    def _rest_before_question(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> str:
        """What the template writes between the last text of the last message and a following user's token."""
        more = [*messages, {"role": "user", "content": "question"}]
        text, anchors = self._anchored(more, tools, template_kwargs)
        end = max((a.end for a in anchors if a.number == len(messages) - 1), default=0)
        token = self.control.search(text, end)
        return text[end : token.start()] if token else ""

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
        first: dict[str, int] = {}  # equal messages stay equal, which some templates look at
        marked = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                number = first.setdefault(json.dumps(message, default=str), number)
            marked.append(_with_anchors(message, number))
        text = self.render(marked, tools, template_kwargs)
        parts: list[str] = []
        anchors: list[_Anchor] = []
        position = length = 0
        for match in ANCHOR.finditer(text):
            parts.append(text[position : match.start()])
            length += match.start() - position
            position = match.end()
            if match[1] is not None:
                anchors.append(_Anchor(int(match[1]), match[2], length, length))
            elif anchors:
                anchors[-1].end = length
        return "".join([*parts, text[position:]]), anchors


def _without_repeated_names(places: list[int], anchors: list[_Anchor]) -> list[int]:
    """The places of a turn's anchors; a template may repeat the name of a call beside the tool's result."""
    kept: list[int] = []
    names: set[str] = set()
    for place in places:
        part = anchors[place].part
        if part not in names:
            kept.append(place)
        if part.startswith("name"):
            names.add(part)
    return kept


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value)
    if isinstance(value, list):
        return any(map(_has_text, value))
    return isinstance(value, str) and WORD.search(value) is not None


def _with_anchors(message: dict, number: int) -> dict:
    """A message whose texts are anchored; templates look at white space and an answer's thinking tags: they aren't."""
    anchored = dict(message)
    if message["role"] != "assistant":
        anchored["content"] = _anchor(message.get("content") or "", number)
        return anchored
    for key, part in (("reasoning_content", "reasoning"), ("content", "content")):
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
        function = {**function, "arguments": _anchored_value(function["arguments"], number, str(index))}
    else:
        function = {**function, "name": _anchor(function["name"], number, f"name{index}")}
    return {**call, "function": function} if "function" in call else function


def _anchored_value(value: Any, number: int, part: str) -> Any:
    if isinstance(value, str):
        return _anchor(value, number, part) if value.strip() else value
    if isinstance(value, dict):
        return {
            (_anchor(key, number, part) if key.strip() else key): _anchored_value(item, number, part)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_anchored_value(item, number, part) for item in value]
    return value


def _anchor(text: str, number: int, part: str = "content") -> str:
    """`text` with anchors around its words; before its white space where it has none."""
    start = f"{ANCHOR_NUMBER}{number}:{part}{ANCHOR_START}"
    if not text.strip():
        return f"{start}{ANCHOR_END}{text}"
    return WORD.sub(lambda m: f"{start}{m[0]}{ANCHOR_END}", text, count=1)
