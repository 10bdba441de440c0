"""Conversations to token ids and labels: every assistant turn with its end-of-turn token, and nothing else.

A row's way: render the template, locate every assistant turn in the text, verify the turns, tokenize, and turn
characters into tokens. A row whose turns can't be verified is rejected with a reason; labels are never guessed.

How turns are located:
    generation tags    by the template's {% generation %} ... {% endgeneration %}, see tag_finder.py
    ChatML scan        from <|im_start|>assistant to <|im_end|> in the text, see chatml_finder.py
    anchors            in any other template, see anchor_finder.py
    built-in template  by generation tags, for tokenizers without a template, see template.py
"""

from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dft.chat.anchor_finder import AnchorFinder
from dft.chat.chatml_finder import ChatMLFinder, is_chatml
from dft.chat.example import Example
from dft.chat.labeler import SupervisedText, label, select_spans
from dft.chat.tag_finder import TagFinder
from dft.chat.template import TEMPLATE_ERRORS, ChatTemplate, Span
from dft.chat.text_encoder import TextEncoder
from dft.chat.tool_calls import with_arguments
from dft.chat.verification import not_rendered, verify
from dft.errors import UserError
from dft.reading.rows import RowError


class ChatFormat:
    """Turns conversations into ids and labels, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer. Without a chat template it is given the built-in one.
        train_on: the assistant turns that are supervised.
        mask_thinking: leave thinking blocks, their tags included, unsupervised.

    Attributes:
        method: how turns are located: "generation tags", "ChatML scan", "anchors" or "built-in template".

    Raises:
        UserError: the tokenizer has no fast version, or no single valid chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: Literal["all", "last"] = "all",
        mask_thinking: bool = False,
    ):
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.__class__.__name__} has no character offsets: a fast tokenizer is needed")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.mask_thinking = mask_thinking
        self.encoder = TextEncoder(tokenizer)
        self.template = ChatTemplate(tokenizer)
        self.method, self._finder = _choose_finder(self.template)

    def render(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text, control tokens of the conversation's own text marked, and its assistant spans.

        Raises:
            RowError: the template refuses the conversation, or a span can't be verified.
        """
        messages, tools, template_kwargs = map(self.template.control.mark, (messages, tools, template_kwargs))
        try:
            text, spans = self._find(with_arguments(messages, as_text=False), tools, template_kwargs)
        except RowError as error:
            if error.reason != "template_error" or not any(m.get("tool_calls") for m in messages):
                raise
            # some templates (DeepSeek's) want the arguments of tool calls as JSON in a text
            text, spans = self._find(with_arguments(messages, as_text=True), tools, template_kwargs)
        verify(text, spans, messages)
        return text, spans

    def encode(self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None) -> Example:
        """Renders, tokenizes and labels one conversation, without truncating it.

        Raises:
            RowError: see `render`; or nothing is supervised; or its control tokens can't be kept as text.
        """
        (result,) = self.encode_batch([(messages, tools, template_kwargs)])
        if isinstance(result, RowError):
            raise result
        return result

    def encode_batch(
        self, conversations: Iterable[tuple[list[dict], list | None, dict | None]]
    ) -> list[Example | RowError]:
        """As `encode`, for many conversations (messages, tools, template arguments) at once, which is faster."""
        rows = [self._supervise(*conversation) for conversation in conversations]
        supervised = [row for row in rows if isinstance(row, SupervisedText)]
        tokens = iter(self.encoder.encode([row.text for row in supervised], [row.borders for row in supervised]))
        return [label(row, next(tokens)) if isinstance(row, SupervisedText) else row for row in rows]

    def _find(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> tuple[str, list[Span]]:
        try:
            return self._finder.find(messages, tools, template_kwargs)
        except TEMPLATE_ERRORS as error:
            raise RowError("template_error", f"the chat template refuses the row: {error}") from error

    def _supervise(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> SupervisedText | RowError:
        try:
            text, spans = self.render(messages, tools, template_kwargs)
            spans, loss_weights = select_spans(text, spans, messages, self.train_on, self.mask_thinking)
        except RowError as error:
            return error
        return SupervisedText(text, spans, loss_weights, not_rendered(text, messages, tools))


def _choose_finder(template: ChatTemplate) -> tuple[str, TagFinder | ChatMLFinder | AnchorFinder]:
    """The most direct way to locate the turns of a template, and its name."""
    if template.has_tags:
        return "built-in template" if template.is_built_in else "generation tags", TagFinder(template)
    if is_chatml(template):
        return "ChatML scan", ChatMLFinder(template)
    return "anchors", AnchorFinder(template)
