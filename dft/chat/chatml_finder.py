"""Locate assistant turns in ChatML: from <|im_start|>assistant to <|im_end|>."""

import re

from dft.chat.control_tokens import MARK_START
from dft.chat.generation_prompt import GenerationPrompt
from dft.chat.template import PROBE, TEMPLATE_ERRORS, ChatTemplate, Span

CHATML_TURN = re.compile(rf"<\|im_start\|>assistant\n(.*?(?<!{MARK_START})<\|im_end\|>)", re.DOTALL)


def is_chatml(template: ChatTemplate) -> bool:
    """Whether a template writes answers as ChatML turns."""
    source = template.source
    if "<|im_start|>" not in source or "<|im_end|>" not in source:
        return False
    try:
        return CHATML_TURN.search(template.render(PROBE)) is not None
    except TEMPLATE_ERRORS:
        return True


class ChatMLFinder:
    """Locates assistant turns in ChatML templates without generation tags, by scanning the rendered text."""

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._prompt = GenerationPrompt(template)

    def find(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text and the span of every assistant turn, its <|im_end|> included.

        Raises:
            TEMPLATE_ERRORS: the template refuses the conversation.
        """
        text = self._template.render(messages, tools, template_kwargs)
        spans = [match.span(1) for match in CHATML_TURN.finditer(text)]
        return text, self._prompt.begin_behind(text, spans, messages, tools, template_kwargs)
