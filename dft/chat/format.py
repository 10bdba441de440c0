"""Conversations to token ids and labels: every assistant turn with its end-of-turn token, and nothing else.

One row's way: render the template, find the character span of every assistant turn, verify the spans,
tokenize, map the spans to tokens. A row whose spans can't be verified is rejected with a reason; it is
never trained on by a guess.

Where the spans come from:
    generation tags   templates with {% generation %} … {% endgeneration %} say it themselves
    ChatML scan       <|im_start|>assistant … <|im_end|> in the rendered text
    anchors           any other template, see template_turns.py
    built-in          tokenizers without a template get a ChatML template with generation tags

Control tokens written inside a conversation's own text stay plain text. They are wrapped in two
private-use characters before rendering, so they can be neither a turn's border nor a token.
"""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dft.chat.example import Example, RowError
from dft.chat.text_encoder import MARK_END, MARK_START, TextEncoder, one_of
from dft.chat.turn_finder import TEMPLATE_ERRORS, Span, TurnFinder, TurnNotFound
from dft.chat.verification import not_rendered, verify
from dft.errors import UserError
from dft.labels import IGNORE_INDEX
from dft.reading.formats import function_of
from dft.reading.strict_json import MalformedRow, decode

logger = logging.getLogger(__name__)

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHATML_TURN = re.compile(rf"<\|im_start\|>assistant\n(.*?(?<!{MARK_START})<\|im_end\|>)", re.DOTALL)
USED_INSIDE = tuple(map(chr, range(0xE0F0, 0xE0F6)))  # marks and anchors
THINKING = {"<think>": "</think>", "[THINK]": "[/THINK]", "<|channel|>analysis<|message|>": "<|end|>"}
THINKING_START = re.compile("|".join(map(re.escape, THINKING)))
PROBE = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]

# HEADER and END are replaced by what the tokenizer has, see ChatFormat._built_in_template
BUILT_IN_TEMPLATE = """\
{%- if tools %}
    {{- 'HEADERsystem\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'You may call these tools, one JSON object between <tool_call> and </tool_call> for each call:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- 'END\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'HEADERassistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n' if not loop.first or message.content }}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- 'END' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- 'HEADER' + message.role + '\\n' + (message.content or '') + 'END\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'HEADERassistant\\n' }}{%- endif %}
"""


@dataclass
class _Rendered:
    """A rendered conversation, and what of it is supervised."""

    text: str  # with marks
    spans: list[Span]
    weights: list[float]  # of the spans
    not_rendered: tuple[str, ...]


def load_chat_template(path: str) -> str:
    """Reads a Jinja chat template.

    Raises:
        UserError: the file can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {path} can't be read: {error}") from error


class ChatFormat:
    """How one tokenizer turns conversations into ids and labels.

    Args:
        tokenizer: a fast tokenizer. Without a chat template it is given the built-in one.
        train_on: the assistant turns that are supervised.
        mask_thinking: leave thinking blocks, their tags included, unsupervised.

    Attributes:
        method: "generation tags", "ChatML scan", "anchors" or "built-in template".

    Raises:
        UserError: the tokenizer has no fast version, or no single chat template.
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
        if tokenizer.chat_template is None:
            tokenizer.chat_template = self._built_in_template()
            self.method = "built-in template"
        elif not isinstance(tokenizer.chat_template, str):
            raise UserError("the tokenizer has several chat templates: choose one with --chat_template FILE")
        elif GENERATION_TAG.search(tokenizer.chat_template):
            self.method = "generation tags"
        elif self._is_chatml():
            self.method = "ChatML scan"
        else:
            self.method = "anchors"
        try:
            self._render_text(PROBE, None, None)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error}): mend it, or give another with "
                "--chat_template FILE"
            ) from error
        except TEMPLATE_ERRORS:
            pass  # it doesn't take this conversation; it may take others
        self.has_tags = GENERATION_TAG.search(tokenizer.chat_template) is not None
        names = set(self.encoder.special) | {tokenizer.eos_token or "<|im_end|>", "<|im_start|>", "<|im_end|>"}
        alternatives = one_of(names)
        self._control_text = re.compile(alternatives)
        self._control = re.compile(rf"(?<!{MARK_START})(?:{alternatives})")
        self._trailing_control = re.compile(rf"(?<!{MARK_START})({alternatives})\s*\Z")
        self._plain_ends: set[str] = set()
        if self.has_tags:
            self._plain_ends = self._learn_plain_ends()
        self._finder: TurnFinder | None = None
        if self.method == "anchors":
            self._finder = TurnFinder(self._render_text, self._control, tokenizer.eos_token)

    def _built_in_template(self) -> str:
        """ChatML where the tokenizer knows its tokens; else ChatML headers in plain text, turns ended by EOS."""
        vocab = self.tokenizer.get_vocab()
        if "<|im_start|>" in vocab and "<|im_end|>" in vocab:
            end = "<|im_end|>"
        elif self.tokenizer.eos_token is not None:
            end = self.tokenizer.eos_token
        else:
            raise UserError("the tokenizer has neither a chat template nor an end token: give --chat_template FILE")
        logger.warning("The tokenizer has no chat template: using the built-in ChatML one, turns end with %s", end)
        return BUILT_IN_TEMPLATE.replace("HEADER", "<|im_start|>").replace("END", end)

    def _is_chatml(self) -> bool:
        """Whether an answer is rendered as a ChatML turn."""
        template = self.tokenizer.chat_template
        if "<|im_start|>" not in template or "<|im_end|>" not in template:
            return False
        try:
            return CHATML_TURN.search(self._render_text(PROBE, None, None)) is not None
        except TEMPLATE_ERRORS:
            return True

    def _learn_plain_ends(self) -> set[str]:
        """The tokens that end plain turns, where the template has generation tags."""
        try:
            texts, tagged = self._render(PROBE, None, None, return_assistant_tokens_mask=True)
            spans = self._tagged_spans(texts[0], tagged[0])
        except (*TEMPLATE_ERRORS, RowError):
            return set()
        ends = (self._trailing_control.search(texts[0], start, end) for start, end in spans)
        return {match[1] for match in ends if match}

    # ---- rendering ------------------------------------------------------------------------------

    def render(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text, control tokens of the conversation's own text marked, and its assistant spans.

        Raises:
            RowError: the template refuses the conversation, or a span can't be verified.
        """
        messages, tools, template_kwargs = (self._mark(value) for value in (messages, tools, template_kwargs))
        try:
            text, spans = self._find_turns(_with_arguments(messages, as_text=False), tools, template_kwargs)
        except RowError as error:
            if error.reason != "template_error" or not any(m.get("tool_calls") for m in messages):
                raise
            # some templates (DeepSeek's) want the arguments of tool calls as JSON in a text
            text, spans = self._find_turns(_with_arguments(messages, as_text=True), tools, template_kwargs)
        verify(text, spans, messages)
        return text, spans

    def _find_turns(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> tuple[str, list[Span]]:
        try:
            if self._finder is not None:
                return self._finder.find(messages, tools, template_kwargs)
            if not self.has_tags:
                text = self._render_text(messages, tools, template_kwargs)
                return text, [match.span(1) for match in CHATML_TURN.finditer(text)]
            texts, tagged = self._render(messages, tools, template_kwargs, return_assistant_tokens_mask=True)
            return texts[0], self._tagged_spans(texts[0], tagged[0])
        except TurnNotFound as error:
            raise RowError("unverified_mask", str(error)) from error
        except TEMPLATE_ERRORS as error:
            raise RowError("template_error", f"the chat template refuses the row: {error}") from error

    def _render_text(
        self,
        messages: list[dict],
        tools: list | None,
        template_kwargs: dict | None,
        add_generation_prompt: bool = False,
    ) -> str:
        return self._render(messages, tools, template_kwargs, add_generation_prompt=add_generation_prompt)[0][0]

    def _render(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None, **settings: bool
    ) -> tuple[list[str], list[list[Span]]]:
        return render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.chat_template,
            **settings,
            **{**self.tokenizer.special_tokens_map, **(template_kwargs or {})},
        )

    def _mark(self, value: Any) -> Any:
        """Wraps every control token in the strings of `value`, in nested lists and objects and their keys too."""
        if isinstance(value, str):
            if not value.isascii() and any(character in value for character in USED_INSIDE):
                raise RowError("private_use_character", "the text holds U+E0F0 to U+E0F5, which are used inside")
            if self._control_text.search(value) is None:
                return value
            return self._control_text.sub(lambda match: f"{MARK_START}{match[0]}{MARK_END}", value)
        if isinstance(value, dict):
            return {self._mark(key): self._mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._mark(item) for item in value]
        return value

    def _tagged_spans(self, text: str, tagged: list[Span]) -> list[Span]:
        """The spans of the tags, each made to end with its end-of-turn token."""
        spans: list[Span] = []
        for start, end in tagged:
            if spans and spans[-1][1] == start:  # one turn in several tags
                start = spans.pop()[0]
            spans.append((start, end))
        return [(start, self._end_of_turn(text, start, end)) for start, end in spans]

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        inside = self._trailing_control.search(text, start, end)
        after = self._control.match(text, end)
        if inside and not (after and after[0] in self._plain_ends and inside[1] not in self._plain_ends):
            return inside.end(1)
        if after:
            return after.end()
        raise RowError("no_end_of_turn", "an assistant turn is not followed by an end-of-turn token")

    # ---- tokenizing -----------------------------------------------------------------------------

    def encode(self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None) -> Example:
        """Renders, tokenizes and labels one conversation, whole.

        Raises:
            RowError: see `render`; or nothing is supervised; or its control tokens can't be kept as text.
        """
        result = next(iter(self.encode_batch([(messages, tools, template_kwargs)])))
        if isinstance(result, RowError):
            raise result
        return result

    def encode_batch(
        self, conversations: Iterable[tuple[list[dict], list | None, dict | None]]
    ) -> list[Example | RowError]:
        """As `encode`, of many conversations (messages, tools, template arguments) at once, which is faster."""
        results: list[Example | RowError] = []
        rendered: list[_Rendered] = []
        places: list[int] = []  # of `rendered` in `results`
        for conversation in conversations:
            try:
                rendered.append(self._render_supervised(*conversation))
                places.append(len(results))
                results.append(RowError("", ""))  # replaced below
            except RowError as error:
                results.append(error)
            except RecursionError:
                results.append(RowError("nested_too_deeply", "its tools or tool calls are nested too deeply"))
        borders = [[border for span in row.spans for border in span] for row in rendered]
        encoded = self.encoder.encode([row.text for row in rendered], borders)
        for place, row, tokens in zip(places, rendered, encoded, strict=True):
            results[place] = self._example(row, tokens)
        return results

    def _render_supervised(self, messages: list[dict], tools: list | None, template_kwargs: dict | None) -> _Rendered:
        text, spans = self.render(messages, tools, template_kwargs)
        weights = [float(m.get("weight", 1.0)) for m in messages if m["role"] == "assistant"]
        if self.train_on == "last":
            spans, weights = spans[-1:], weights[-1:]
        if self.mask_thinking:
            parts = [_without_thinking(text, span) for span in spans]
            weights = [weight for weight, some in zip(weights, parts, strict=True) for _ in some]
            spans = [span for some in parts for span in some]
        kept = [(span, weight) for span, weight in zip(spans, weights, strict=True) if weight > 0]
        if not kept:
            raise RowError("nothing_to_train_on", "every assistant turn has the weight 0 or isn't asked for")
        return _Rendered(text, [s for s, _ in kept], [w for _, w in kept], not_rendered(text, messages, tools))

    def _example(self, row: _Rendered, tokens: tuple[np.ndarray, list[int]] | None) -> Example | RowError:
        if tokens is None:
            return RowError("control_token_in_text", "this tokenizer can't keep control tokens as plain text")
        ids, borders = tokens
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        weights = None
        if any(weight != 1 for weight in row.weights):
            weights = np.ones(len(ids), dtype=np.float32)
        for first, last, weight in zip(borders[::2], borders[1::2], row.weights, strict=True):
            labels[first:last] = ids[first:last]
            if weights is not None:
                weights[first:last] = weight
        return Example(ids, labels, weights, MARK_START in row.text, row.not_rendered)


def _without_thinking(text: str, span: Span) -> list[Span]:
    """What is left of a span between its thinking blocks."""
    start, end = span
    left: list[Span] = []
    while opening := THINKING_START.search(text, start, end):
        closing = text.find(THINKING[opening[0]], opening.end(), end)
        if closing < 0:
            break
        left.append((start, opening.start()))
        start = closing + len(THINKING[opening[0]])
        while start < end and text[start].isspace():
            start += 1
    return [(a, b) for a, b in [*left, (start, end)] if a < b]


def _with_arguments(messages: list[dict], as_text: bool) -> list[dict]:
    """Messages with the arguments of every tool call as an object, or as JSON in a text."""
    if not any(message.get("tool_calls") for message in messages):
        return messages
    return [
        {**message, "tool_calls": [_call_with_arguments(call, as_text) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _call_with_arguments(call: dict, as_text: bool) -> dict:
    function = function_of(call)
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            parsed = decode(arguments)
        except MalformedRow:
            parsed = None
        if type(parsed) is dict:  # not one with a repeated key
            arguments = parsed
    function = {**function, "arguments": arguments} if "arguments" in function else function
    return {**call, "function": function} if "function" in call else function
