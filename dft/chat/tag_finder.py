"""Locate assistant turns by the generation tags of a chat template."""

from dft.chat.generation_prompt import GenerationPrompt
from dft.chat.template import PROBE, TEMPLATE_ERRORS, ChatTemplate, Span
from dft.reading.rows import RowError


class TagFinder:
    """Locates assistant turns in templates with {% generation %} tags.

    Some templates write the end-of-turn token inside the tags and others after them. Each span is made to end
    with that token.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._control = template.control
        self._prompt = GenerationPrompt(template)
        self._plain_ends: set[str] = set()  # the tokens that end turns without tool calls
        self._plain_ends = self._learn_plain_ends()

    def _learn_plain_ends(self) -> set[str]:
        try:
            text, spans = self.find(PROBE)
        except (*TEMPLATE_ERRORS, RowError):
            return set()
        ends = (self._control.trailing.search(text, start, end) for start, end in spans)
        return {match[1] for match in ends if match}

    def find(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text and the span of every assistant turn.

        Raises:
            RowError: a turn has no end-of-turn token.
            TEMPLATE_ERRORS: the template refuses the conversation.
        """
        text, tagged = self._template.render_tagged(messages, tools, template_kwargs)
        spans: list[Span] = []
        for start, end in tagged:
            if spans and self._is_unfinished(text, spans[-1], start):
                start = spans.pop()[0]  # the template writes one turn in several pairs of tags
            spans.append((start, end))
        spans = [(start, self._end_of_turn(text, start, end)) for start, end in spans]
        return text, self._prompt.begin_behind(text, spans, messages, tools, template_kwargs)

    def _is_unfinished(self, text: str, span: Span, start_of_next: int) -> bool:
        """Whether a tagged text and the one after it belong to one turn: no control token is between them."""
        last = self._control.trailing.search(text, *span)
        if last and (last[1] in self._plain_ends or not self._plain_ends):
            return False
        return self._control.unmarked.search(text, span[1], start_of_next) is None

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        inside = self._control.trailing.search(text, start, end)
        after = self._control.unmarked.match(text, end)
        # a tool call may close with a control token of its own, before the token that ends the turn
        if inside and not (after and after[0] in self._plain_ends and inside[1] not in self._plain_ends):
            return inside.end(1)
        if after:
            return after.end()
        raise RowError("no_end_of_turn", "an assistant turn is not followed by an end-of-turn token")
