"""Locate assistant turns in templates without generation tags, by anchors around the texts of the messages.

The conversation is rendered twice: as it is, and with anchors. Without them, the second text must equal the first,
so the anchors stand exactly where the texts do, whatever the template is.

A turn begins behind its generation prompt, or, where that can't tell (Mistral's template has none), behind what the
template writes before a plain answer. A turn ends with the first control token after its text that doesn't belong
inside a turn.
"""

from functools import partial
from typing import NamedTuple

from dft.chat.anchors import THINKING_TAG, Anchor, render_anchored
from dft.chat.generation_prompt import QUESTION, GenerationPrompt, is_surely_answer
from dft.chat.template import TEMPLATE_ERRORS, ChatTemplate, Span
from dft.chat.template_shape import end_of_turn, learn_shape
from dft.reading.messages import is_empty
from dft.reading.rows import RowError

REMEDY = "give one that does with --chat_template FILE"


class Conversation(NamedTuple):
    """What a template renders."""

    messages: list[dict]
    tools: list | None
    template_kwargs: dict | None


class AnchorFinder:
    """Locates assistant turns in the texts of any template.

    Where the template doesn't end the last turn of a conversation, the tokenizer's EOS does.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._control = template.control.unmarked
        self._prompt = GenerationPrompt(template)
        self._shape = learn_shape(template, self._prompt.header)

    def find(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text and the span of every assistant turn.

        Raises:
            RowError: a turn can't be located for certain.
            TEMPLATE_ERRORS: the template refuses the conversation.
        """
        conversation = Conversation(messages, tools, template_kwargs)
        text, anchors = self._anchored(conversation)
        indices: dict[int, list[int]] = {}  # message number -> indices of its anchors
        for index, anchor in enumerate(anchors):
            indices.setdefault(anchor.number, []).append(index)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number not in indices and is_empty(message):
                before = spans[-1][1] if spans else 0
                start = content_end = self._start_of_empty_turn(text, number, conversation, before)
                following = next((a.start for a in anchors if a.start >= start), len(text))
            else:
                first, last = _anchors_of_turn(number, message, indices.get(number, []), anchors)
                before = anchors[first - 1].end if first else 0
                start = self._start_of_turn(text, number, conversation, before, anchors[first])
                content_end = anchors[last].end
                following = anchors[last + 1].start if last + 1 < len(anchors) else len(text)
            without_the_rest = partial(self._render_up_to, number, conversation)
            end = end_of_turn(self._template, self._shape, text, content_end, following, without_the_rest)
            if end is None:
                if number + 1 < len(messages) or not self._may_end_with_eos(text[content_end:], conversation):
                    raise RowError("unverified_mask", f"no end-of-turn token follows message {number}")
                text += self._template.tokenizer.eos_token
                end = len(text)
            is_next = messages[number + 1 : number + 2] and messages[number + 1]["role"] == "assistant"
            self._refuse_several_turns(text, (start, end), end if is_next else max(end, following), number)
            spans.append((start, end))
        return text, spans

    def _anchored(self, conversation: Conversation) -> tuple[str, list[Anchor]]:
        """The rendered text, and the anchors of it."""
        text = self._template.render(*conversation)
        for empty_turns in (True, False):  # a template may ask whether a turn is empty: with anchors it is not
            shown, anchors = render_anchored(self._template, *conversation, empty_turns=empty_turns)
            if shown == text:
                return text, anchors
        raise RowError("unverified_mask", "the template changes with the text of the messages")

    def _render_up_to(self, number: int, conversation: Conversation) -> str:
        """The conversation with message `number` as its last; nothing where the template refuses it."""
        messages, tools, template_kwargs = conversation
        try:
            return self._template.render(messages[: number + 1], tools, template_kwargs)
        except TEMPLATE_ERRORS:
            return ""

    def _start_of_empty_turn(self, text: str, number: int, conversation: Conversation, before: int) -> int:
        messages, tools, template_kwargs = conversation
        start = self._prompt.start(text, messages[:number], tools, template_kwargs, before)
        if start is None:
            raise RowError("unverified_mask", f"message {number}, which is empty, can't be located")
        return start

    def _refuse_several_turns(self, text: str, span: Span, following: int, number: int) -> None:
        """Refuses a message that the template writes as several turns: generation stops at the end of the first.

        Args:
            following: where the text of the next message starts, if it isn't the assistant's.
        """
        (start, end), eos = span, self._template.tokenizer.eos_token
        header = "" if self._prompt.is_at_every_end else self._prompt.header.strip()
        if (header and header in text[end:following]) or (
            eos and any(m[0] == eos and m.end() < end for m in self._control.finditer(text, start, end))
        ):
            raise RowError("unverified_mask", f"the template writes message {number} as several turns")

    def _start_of_turn(self, text: str, number: int, conversation: Conversation, before: int, anchor: Anchor) -> int:
        """Where the turn that `anchor` is the first of begins.

        Args:
            before: where the text of the message before it ends.
        """
        messages, tools, template_kwargs = conversation
        header, leading = self._prompt.header, text[before : anchor.start]
        is_plain = header and leading.endswith(header) and leading.count(header) == 1
        if is_plain and is_surely_answer(text, anchor.start, messages[number].get("content") or ""):
            return anchor.start
        start = self._prompt.start(text, messages[:number], tools, template_kwargs, before)
        if start is not None and start <= anchor.start:
            return start
        start = self._start_by_shape(before, leading, anchor)
        return self._prompt.behind_opener(text, start, messages[:number], tools, template_kwargs)

    def _start_by_shape(self, before: int, leading: str, anchor: Anchor) -> int:
        """Where a turn begins, by what the template writes before other turns.

        Args:
            leading: what stands between the message before it, which ends at `before`, and its first text.
        """
        for header in filter(None, (self._shape.header, self._shape.plain_header)):
            if header in leading:  # a turn of several parts repeats its header: the first one begins it
                if leading.count(header) > 1 and not self._control.search(header):
                    problem = "the header of a turn is plain text and stands in the tools or elsewhere too"
                    raise RowError("unverified_mask", problem)
                return before + leading.index(header) + len(header)
        found = [leading.index(opener) for opener in self._shape.openers if opener in leading]
        if not found and anchor.part != "content":
            problem = "the template has no header before a tool call or a thinking block"
            raise RowError("unverified_mask", problem)
        leading = leading[: min(found)] if found else leading
        tokens = list(self._control.finditer(leading))
        if tokens and not found and THINKING_TAG.sub("", leading[tokens[-1].end() :]).strip():
            raise RowError("unverified_mask", "the turn's header is not the one of the generation prompt")
        return before + (tokens[-1].end() if tokens else len(leading.rstrip(" ")))

    def _may_end_with_eos(self, rest: str, conversation: Conversation) -> bool:
        """Whether the last turn lacks nothing but an end-of-turn token.

        Args:
            rest: what follows the last text of the turn.
        """
        if self._template.tokenizer.eos_token is None:
            return False
        if not rest.strip():
            return True
        # The template must write the same after the turn's text as it writes there before a next question.
        messages = [*conversation.messages, QUESTION]
        text, anchors = render_anchored(self._template, messages, *conversation[1:])
        end = max((a.end for a in anchors if a.number == len(messages) - 2), default=0)
        token = self._control.search(text, end)
        return rest == (text[end : token.start()] if token else "")


def _anchors_of_turn(number: int, message: dict, indices: list[int], anchors: list[Anchor]) -> tuple[int, int]:
    """The indices of the first and the last anchor of an assistant turn, which is shown whole and in one place."""
    if not indices:
        what = "the tool calls of message" if message.get("tool_calls") else "assistant message"
        detail = f"the chat template doesn't show {what} {number}: {REMEDY}"
        raise RowError("unverified_mask", detail)
    own = _without_repeated_names(indices, anchors)
    shown = {anchors[index].part.removeprefix("name") for index in own}
    if any(str(i) not in shown for i in range(len(message.get("tool_calls") or []))):
        detail = f"the chat template doesn't show every tool call of message {number}: {REMEDY}"
        raise RowError("unverified_mask", detail)
    first, last = own[0], own[-1]
    if any(a.number != number for a in anchors[first : last + 1]):
        raise RowError("unverified_mask", f"the text of message {number} is shown in several places")
    return first, last


def _without_repeated_names(indices: list[int], anchors: list[Anchor]) -> list[int]:
    """The indices of a turn's anchors; a template may repeat the name of a call beside the result of the tool."""
    kept: list[int] = []
    names: set[str] = set()
    for index in indices:
        part = anchors[index].part
        if part not in names:
            kept.append(index)
        if part.startswith("name"):
            names.add(part)
    return kept
