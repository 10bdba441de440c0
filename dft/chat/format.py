"""Conversations to token ids and labels: every assistant turn with its end-of-turn token, and nothing else.

A row's way: render the template, locate every assistant turn in the text, verify the turns, tokenize, and turn
characters into tokens. A row whose turns can't be verified is rejected with a reason; labels are never guessed.

How turns are located:
    generation tags    by the template's {% generation %} ... {% endgeneration %}, see tag_finder.py
    ChatML scan        from <|im_start|>assistant to <|im_end|> in the text, see chatml_finder.py
    anchors            in any other template, see anchor_finder.py
    built-in template  by generation tags, for tokenizers without a template, see template.py
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dft.chat.anchor_finder import AnchorFinder
from dft.chat.chatml_finder import ChatMLFinder, is_chatml
from dft.chat.example import Example
from dft.chat.generation_prompt import GenerationPrompt
from dft.chat.labeler import SupervisedText, label, select_spans, weights_of_turns
from dft.chat.remarks import (
    EMPTY_TURN,
    SYSTEM_IN_LAST_QUESTION,
    TOOLS_NOT_SHOWN,
    TURN_WITHOUT_THINKING,
    TYPED_TAGS,
    UNREAD_KEY,
)
from dft.chat.tag_finder import TagFinder
from dft.chat.template import TEMPLATE_ERRORS, ChatTemplate, Span
from dft.chat.text_encoder import TextEncoder
from dft.chat.tool_calls import with_arguments, with_short_ids
from dft.chat.verification import only_thinks, tools_not_rendered, verify
from dft.config.data import DataConfig, EmptyTurns, TrainOn
from dft.errors import UserError
from dft.reading.messages import is_empty
from dft.reading.rows import RowError

AS_OBJECTS, AS_TEXTS = (partial(with_arguments, as_text=as_text) for as_text in (False, True))
# What templates take as tool calls; each form is tried where a template refuses those before it
FORMS_OF_CALLS = (
    AS_OBJECTS,
    AS_TEXTS,  # DeepSeek's
    lambda messages: with_short_ids(AS_OBJECTS(messages)),  # Mistral's
    lambda messages: with_short_ids(AS_TEXTS(messages)),
)


@dataclass(frozen=True)
class Rendering:
    """A conversation as text.

    Attributes:
        text: the rendered text, control tokens of the conversation's own text marked.
        spans: the characters [start, end) of each assistant turn.
        lacks_thinking: for each turn whether the template leaves its thinking out.
        messages: what was rendered, with marks.
        is_system_moved: whether the system message stands in the last question, where the template shows it.
    """

    text: str
    spans: list[Span]
    lacks_thinking: list[bool]
    messages: list[dict]
    is_system_moved: bool = False


class ChatFormat:
    """Turns conversations into ids and labels, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer. Without a chat template it is given the built-in one.
        train_on: the assistant turns that are supervised.
        mask_thinking: leave thinking blocks, their tags included, unsupervised.
        empty_turns: what to do with assistant turns that say nothing.
        template_kwargs: arguments of the chat template for all conversations; their own take precedence.

    Attributes:
        method: how turns are located: "generation tags", "ChatML scan", "anchors" or "built-in template".

    Raises:
        UserError: the tokenizer has no fast version, or no single valid chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train_on: TrainOn = "all",
        mask_thinking: bool = False,
        empty_turns: EmptyTurns = "keep",
        template_kwargs: dict | None = None,
    ):
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.__class__.__name__} has no character offsets: a fast tokenizer is needed")
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.mask_thinking = mask_thinking
        self.empty_turns = empty_turns
        self.template = ChatTemplate(tokenizer, template_kwargs)
        self.encoder = TextEncoder(tokenizer, self.template.control.ids)
        self.method, self._finder = _choose_finder(self.template)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> "ChatFormat":
        """The format that the data flags ask for."""
        return cls(tokenizer, config.train_on, config.mask_thinking, config.empty_turns, config.template_kwargs)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides over ids and labels beside the tokenizer, as JSON values."""
        return {
            "train_on": self.train_on,
            "mask_thinking": self.mask_thinking,
            "empty_turns": self.empty_turns,
            "template_kwargs": self.template.template_kwargs,
        }

    def render(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> Rendering:
        """The rendered text and its assistant turns.

        Raises:
            RowError: the template refuses the conversation, or a turn can't be verified.
        """
        messages, tools, template_kwargs = map(self.template.control.mark, (messages, tools, template_kwargs))
        messages = self.template.with_its_reasoning_key(messages)
        try:
            return self._render(messages, tools, template_kwargs)
        except RowError as error:
            moved = self.template.with_system_in_last_question(messages, tools, template_kwargs)
            if error.reason != "message_not_rendered" or moved is None:
                raise
        return replace(self._render(moved, tools, template_kwargs), is_system_moved=True)

    def _render(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> Rendering:
        """As `render`; calls without words have an empty text as content, or null where the template wants that."""
        try:
            return self._render_calls(messages, messages, tools, template_kwargs)
        except RowError as error:
            with_nulls = self.template.with_null_contents(messages)
            if with_nulls is messages:
                raise
            refusal = error
        try:
            rendering = self._render_calls(messages, with_nulls, tools, template_kwargs)
        except RowError:
            raise refusal from None
        if rendering.text.count("None") > json.dumps([messages, tools], ensure_ascii=False).count("None"):
            raise refusal  # the template has written the null
        return rendering

    def _render_calls(
        self, messages: list[dict], form_of_messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> Rendering:
        """As `render`, with tool calls in the first form that the template takes.

        Args:
            form_of_messages: what is rendered of the messages.
        """
        has_calls = any(message.get("tool_calls") for message in messages)
        refusal: RowError | None = None
        for form in FORMS_OF_CALLS if has_calls else FORMS_OF_CALLS[:1]:
            rendered = form(form_of_messages)
            try:
                text, spans = self._find(rendered, tools, template_kwargs)
            except RowError as error:
                if error.reason != "template_error":
                    raise
                refusal = refusal or error
            else:
                return Rendering(text, spans, verify(text, spans, messages), rendered)
        raise refusal

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

    def prompt(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> np.ndarray:
        """The ids from which a model writes the last turn of a conversation, int32 [T].

        All messages before the last one, in the form in which they are trained on, and the generation prompt.

        Args:
            messages: the last one is the assistant's; of its text nothing is in the prompt.

        Raises:
            RowError: see `render`; or the template refuses the prompt, or control tokens can't be kept as text.
        """
        rendering = self.render(messages, tools, template_kwargs)
        tools, template_kwargs = map(self.template.control.mark, (tools, template_kwargs))
        before = rendering.messages[:-1]
        try:
            text = self.template.render(before, tools, template_kwargs, add_generation_prompt=True)
        except TEMPLATE_ERRORS as error:
            raise RowError("template_error", f"the chat template refuses the prompt: {error}") from error
        if not self._generation_prompt.header:  # the template has none
            text = rendering.text[: rendering.spans[-1][0]]
        return self._ids_of(text)

    def last_turn(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> np.ndarray:
        """The ids of the last turn of a conversation, the assistant's, with its end, int32 [T].

        Raises:
            RowError: see `render`; or control tokens can't be kept as text.
        """
        rendering = self.render(messages, tools, template_kwargs)
        start, end = rendering.spans[-1]
        return self._ids_of(rendering.text[start:end])

    def _ids_of(self, text: str) -> np.ndarray:
        """The ids of a rendered text, int32 [T].

        Raises:
            RowError: control tokens of the conversation's own text can't be kept as text.
        """
        (encoded,) = self.encoder.encode([text], [[]])
        if encoded is None:
            raise RowError("control_token_in_text", "this tokenizer can't keep control tokens as plain text")
        return encoded[0]

    @cached_property
    def _generation_prompt(self) -> GenerationPrompt:
        return GenerationPrompt(self.template)

    def _find(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> tuple[str, list[Span]]:
        try:
            return self._finder.find(messages, tools, template_kwargs)
        except TEMPLATE_ERRORS as error:
            raise RowError("template_error", f"the chat template refuses the row: {error}") from error

    def _supervise(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> SupervisedText | RowError:
        turns = [message for message in messages if message["role"] == "assistant"]
        try:
            weights = weights_of_turns(turns, self.train_on, self.empty_turns)
            rendering = self.render(messages, tools, template_kwargs)
            spans, loss_weights = select_spans(rendering.text, rendering.spans, weights, self.mask_thinking)
        except RowError as error:
            return error
        remarks = self._remarks(rendering, messages, tools, weights)
        return SupervisedText(rendering.text, spans, loss_weights, remarks)

    def _remarks(
        self, rendering: Rendering, messages: list[dict], tools: list | None, weights: list[float]
    ) -> tuple[str, ...]:
        """What the report counts of a row, see dft.chat.remarks."""
        turns = [message for message in messages if message["role"] == "assistant"]
        supervised = [i for i, weight in enumerate(weights) if weight > 0]
        lacks_thinking = rendering.lacks_thinking
        remarks = [
            EMPTY_TURN for i in supervised if is_empty(turns[i]) or (lacks_thinking[i] and only_thinks(turns[i]))
        ]
        if not self.mask_thinking:
            remarks += [TURN_WITHOUT_THINKING for i in supervised if lacks_thinking[i]]
        if tools and tools_not_rendered(rendering.text, tools):
            remarks.append(TOOLS_NOT_SHOWN)
        if rendering.is_system_moved:
            remarks.append(SYSTEM_IN_LAST_QUESTION)
        if self.template.has_typed_tags(messages):
            remarks.append(TYPED_TAGS)
        return (*remarks, *(UNREAD_KEY + key for key in self.template.unread_keys(messages)))


def _choose_finder(template: ChatTemplate) -> tuple[str, TagFinder | ChatMLFinder | AnchorFinder]:
    """The most direct way to locate the turns of a template, and its name."""
    if template.has_tags:
        return "built-in template" if template.is_built_in else "generation tags", TagFinder(template)
    if is_chatml(template):
        return "ChatML scan", ChatMLFinder(template)
    return "anchors", AnchorFinder(template)
