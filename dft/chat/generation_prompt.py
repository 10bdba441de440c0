"""Where assistant turns begin: behind their generation prompt, as it is at inference.

What the model must write is everything after the generation prompt. So where the template's generation prompt for the
messages before a turn is a prefix of the rendered conversation, the turn begins where that prefix ends, whatever the
template is. It isn't a prefix where the template shows earlier turns otherwise than while they were made, or where
the prompt opens a thinking block that the turn doesn't have.
"""

import os

from dft.chat.template import TEMPLATE_ERRORS, ChatTemplate, Span

QUESTION = {"role": "user", "content": "question"}
ANSWER = {"role": "assistant", "content": "answer"}
OPENERS = ("<", "[")  # an answer that begins so might be what a generation prompt ends with


class GenerationPrompt:
    """The generation prompts of one template.

    Attributes:
        header: the prompt after a question, without a thinking block and spaces at its end; "" where the template has
            no generation prompt.
        is_at_every_end: whether the template writes it whether it is asked for or not, as Command R7B's.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self.is_at_every_end = False
        self.header = self._learn_header()

    def _learn_header(self) -> str:
        try:
            without = self._template.render([QUESTION])
            prompted = self._template.render([QUESTION], add_generation_prompt=True)
            header = prompted[common_length(self._template, without, prompted) :]
            if not header:
                self.is_at_every_end = True
                header = self._header_at_every_end(without, self._template.render([QUESTION, ANSWER]))
        except TEMPLATE_ERRORS:
            return ""
        return header.partition("<think>")[0].removesuffix("</think>").rstrip(" ")

    def _header_at_every_end(self, question: str, answered: str) -> str:
        """What stands behind the token that ends the last turn, be it the user's or the assistant's."""
        length = len(os.path.commonprefix([question[::-1], answered[::-1]]))
        tokens = list(self._template.control.unmarked.finditer(question, len(question) - length))
        if len(tokens) < 2 or tokens[-1][0] == self._template.tokenizer.eos_token:
            return ""
        return question[tokens[0].end() :].lstrip()

    def start(
        self, text: str, before: list[dict], tools: list | None, template_kwargs: dict | None, at_least: int = 0
    ) -> int | None:
        """Where the turn after the messages `before` begins in the rendered conversation; None where this can't tell.

        Args:
            at_least: the turn can't begin before this.
        """
        prompt = self._after(before, tools, template_kwargs)
        if prompt is None:
            return None
        if not text.startswith(prompt):
            header = prompt.rfind(self.header, at_least)
            if header >= 0:
                prompt = prompt[: header + len(self.header)]  # without the thinking block that it opens
                if not text.startswith(prompt):
                    return None
            else:  # no header here, as DeepSeek's after the result of a tool
                prompt = prompt[: common_length(self._template, text, prompt)]
        start = len(prompt)
        if text.startswith(self.header, start):  # the prompt ends before the header, as in other turns it doesn't
            start += len(self.header)
        while start > 0 and text[start - 1] == " ":  # one token with the first word, in most vocabularies
            start -= 1
        return start if start >= at_least else None

    def behind_opener(
        self, text: str, start: int, before: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> int:
        """`start`, the end of a turn's header, or the end of the thinking tag behind it that the prompt has too."""
        prompt = self._after(before, tools, template_kwargs) or ""
        opener = prompt[prompt.rfind(self.header) + len(self.header) :] if self.header in prompt else ""
        return start + len(opener) if text.startswith(opener, start) else start

    def _after(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> str | None:
        """The messages with the generation prompt; None where there is none."""
        if not self.header:
            return None
        try:
            return self._template.render(messages, tools, template_kwargs, add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return None

    def begin_behind(
        self, text: str, spans: list[Span], messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> list[Span]:
        """The spans of all turns, begun behind their generation prompts where these can tell."""
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(numbers) != len(spans):
            return spans
        moved: list[Span] = []
        for number, (start, end) in zip(numbers, spans, strict=True):
            if not is_surely_answer(text, start, messages[number].get("content") or ""):
                at_least = moved[-1][1] if moved else 0
                before = messages[:number]
                prompted = self.start(text, before, tools, template_kwargs, at_least)
                if prompted is None or prompted >= end:
                    prompted = self.behind_opener(text, start, before, tools, template_kwargs)
                start = prompted
            moved.append((start, end))
        return moved


def is_surely_answer(text: str, start: int, content: str) -> bool:
    """Whether the content of a turn stands at a place, and no generation prompt can reach into it."""
    return bool(content) and not content.startswith(OPENERS) and text.startswith(content, start)


def common_length(template: ChatTemplate, one: str, other: str) -> int:
    """The length of the common beginning of two rendered texts, no control token cut in two."""
    length = len(os.path.commonprefix([one, other]))
    longest = 64  # characters of a control token
    for text in (one, other):
        for match in template.control.unmarked.finditer(text, max(0, length - longest), length + longest):
            if match.start() < length < match.end():
                length = match.start()
    return length
