"""Locate assistant turns in templates without generation tags, by anchors around the texts of the messages.

The conversation is rendered twice: as it is, and with anchors. Without them, the second text must equal the first,
so the anchors stand exactly where the texts do, whatever the template is.

A turn begins after its header: what the template writes as generation prompt, or, without one (Mistral's has
none), what it writes before a plain answer. A turn ends with the first control token after its text that doesn't
belong inside a turn.
"""

from dft.chat.anchors import THINKING_TAG, Anchor, render_anchored
from dft.chat.template import ChatTemplate, Span
from dft.chat.template_shape import end_of_turn, learn_shape
from dft.reading.rows import RowError


class AnchorFinder:
    """Locates assistant turns in the texts of any template.

    Where the template doesn't end the last turn of a conversation, the tokenizer's EOS does.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._control = template.control.unmarked
        self._shape = learn_shape(template)

    def find(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text and the span of every assistant turn.

        Raises:
            RowError: a turn can't be located for certain.
            TEMPLATE_ERRORS: the template refuses the conversation.
        """
        text, anchors = render_anchored(self._template, messages, tools, template_kwargs)
        if self._template.render(messages, tools, template_kwargs) != text:
            raise RowError("unverified_mask", "the template changes with the text of the messages")
        indices: dict[int, list[int]] = {}  # message number -> indices of its anchors
        for index, anchor in enumerate(anchors):
            indices.setdefault(anchor.number, []).append(index)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            first, last = _anchors_of_turn(number, message, indices.get(number, []), anchors)
            start = self._start_of_turn(text, anchors[first - 1].end if first else 0, anchors[first])
            limit = anchors[last + 1].start if last + 1 < len(anchors) else len(text)
            end = end_of_turn(self._template, self._shape, text, anchors[last].end, limit)
            if end is None:
                rest = text[anchors[last].end :]
                if number + 1 < len(messages) or not self._may_end_with_eos(rest, messages, tools, template_kwargs):
                    raise RowError("unverified_mask", f"no end-of-turn token follows message {number}")
                text += self._template.tokenizer.eos_token
                end = len(text)
            spans.append((start, end))
        return text, spans

    def _start_of_turn(self, text: str, before: int, anchor: Anchor) -> int:
        """Where the turn that `anchor` is the first of begins.

        Args:
            before: where the text of the message before it ends.
        """
        leading = text[before : anchor.start]
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

    def _may_end_with_eos(
        self, rest: str, messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> bool:
        """Whether the last turn lacks nothing but an end-of-turn token.

        Args:
            rest: what follows the last text of the turn.
        """
        if self._template.tokenizer.eos_token is None:
            return False
        if not rest.strip():
            return True
        # The template must write the same after the turn's text as it writes there before a next question.
        messages = [*messages, {"role": "user", "content": "question"}]
        text, anchors = render_anchored(self._template, messages, tools, template_kwargs)
        end = max((a.end for a in anchors if a.number == len(messages) - 2), default=0)
        token = self._control.search(text, end)
        return rest == (text[end : token.start()] if token else "")


def _anchors_of_turn(number: int, message: dict, indices: list[int], anchors: list[Anchor]) -> tuple[int, int]:
    """The indices of the first and the last anchor of an assistant turn, which is shown whole and in one place."""
    if not indices:
        raise RowError("unverified_mask", f"the template doesn't show message {number}, an assistant turn")
    own = _without_repeated_names(indices, anchors)
    shown = {anchors[index].part.removeprefix("name") for index in own}
    if any(str(i) not in shown for i in range(len(message.get("tool_calls") or []))):
        raise RowError("unverified_mask", f"the template doesn't show every tool call of message {number}")
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
