"""Conversations to token ids and labels: every assistant turn with its end-of-turn token, and nothing else.

One row's way: render the template once, find the character span of every assistant turn, verify the
spans, tokenise once, map the spans to tokens by offsets. A row whose spans can't be verified is
rejected with a reason; it is never trained on by a guess.

Where the spans come from:
    generation tags   templates with {% generation %} … {% endgeneration %} say it themselves
    ChatML scan       <|im_start|>assistant … <|im_end|> in the rendered text
    built-in          tokenizers without a template get a ChatML template with generation tags

Control tokens written inside a conversation's own text stay plain text. They are wrapped in two
private-use characters before rendering, so they can be neither a turn's border nor a token.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dft_loss import IGNORE_INDEX
from dist_logger import UserError, get_logger

logger = get_logger(__name__)

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK_START, MARK_END = "\ue0f0", "\ue0f1"  # around control tokens that are a conversation's own text
MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}", re.DOTALL)
CHATML_TURN = re.compile(rf"<\|im_start\|>assistant\n(.*?(?<!{MARK_START})<\|im_end\|>)", re.DOTALL)
Span = tuple[int, int]  # characters [start, end) of the rendered text

# HEADER and END are replaced by what the tokenizer has, see ChatFormat.__init__
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


class RowRejected(Exception):
    """A row that can't be trained on: a short reason to count by, and a detail for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass
class Example:
    """One row ready to train on. input_ids and labels int32 [T]; labels -100 where nothing is supervised."""

    input_ids: np.ndarray
    labels: np.ndarray
    has_control_text: bool  # control tokens stand in the conversation's own text
    not_rendered: tuple[str, ...] = ()  # columns that the conversation has and the chat template never shows
    is_truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss scores; the first token of a row is never predicted."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


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

    Attributes:
        method: "generation tags", "ChatML scan" or "built-in template".

    Raises:
        UserError: the tokenizer has no offsets, or the template shows no assistant turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise UserError(f"{tokenizer.__class__.__name__} has no character offsets: a fast tokenizer is needed")
        self.tokenizer = tokenizer
        if tokenizer.chat_template is None:
            tokenizer.chat_template = self._built_in_template()
            self.method = "built-in template"
        elif not isinstance(tokenizer.chat_template, str):
            raise UserError("the tokenizer has several chat templates: choose one with --chat_template FILE")
        elif GENERATION_TAG.search(tokenizer.chat_template):
            self.method = "generation tags"
        elif "<|im_start|>" in tokenizer.chat_template and "<|im_end|>" in tokenizer.chat_template:
            self.method = "ChatML scan"
        else:
            raise UserError(
                "the chat template neither is ChatML nor has {% generation %} tags, so its assistant turns can't be "
                "told apart: put the tags around what the assistant writes and pass it with --chat_template FILE"
            )
        self.has_tags = GENERATION_TAG.search(tokenizer.chat_template) is not None
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= {tokenizer.eos_token or "<|im_end|>", "<|im_start|>", "<|im_end|>"}
        alternatives = "|".join(re.escape(t) for t in sorted(special, key=len, reverse=True))
        self._control = re.compile(alternatives)
        self._trailing_control = re.compile(rf"(?<!{MARK_START})({alternatives})\s*\Z")

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

    # ---- rendering ------------------------------------------------------------------------------

    def render(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The rendered text, control tokens of the conversation's own text marked, and its assistant spans.

        Raises:
            RowRejected: the template refuses the conversation, or a span can't be verified.
        """
        messages, tools, template_kwargs = (self._mark(value) for value in (messages, tools, template_kwargs))
        try:
            texts, tagged = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=self.has_tags,
                **{**self.tokenizer.special_tokens_map, **(template_kwargs or {})},
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowRejected("template_error", f"the chat template refuses the row: {error}") from error
        text = texts[0]
        if self.has_tags:
            spans = self._tagged_spans(text, tagged[0])
        else:
            spans = [match.span(1) for match in CHATML_TURN.finditer(text)]
        self._verify(text, spans, messages)
        return text, spans

    def _mark(self, value: Any) -> Any:
        """Wraps every control token in the strings of `value`, in nested lists and objects and their keys too."""
        if isinstance(value, str):
            if MARK_START in value or MARK_END in value:
                raise RowRejected("private_use_character", "the text holds U+E0F0 or U+E0F1, which are used inside")
            return self._control.sub(lambda m: f"{MARK_START}{m[0]}{MARK_END}", value)
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
        if inside:
            return inside.end(1)
        after = self._control.match(text, end)
        if after:
            return after.end()
        raise RowRejected("no_end_of_turn", "an assistant turn is not followed by an end-of-turn token")

    def _verify(self, text: str, spans: list[Span], messages: list[dict]) -> None:
        """Every assistant turn has its span, in order, with its text; every other text is in the render."""
        turns = [m for m in messages if m["role"] == "assistant"]
        if len(turns) != len(spans):
            raise RowRejected("unverified_mask", f"{len(turns)} assistant turns, {len(spans)} found in the render")
        for turn, (start, end) in zip(turns, spans, strict=True):
            span = text[start:end]
            content = (turn.get("content") or "").strip()
            # reasoning models drop the thinking of earlier turns from the render
            if content not in span and content.split("</think>")[-1].strip() not in span:
                raise RowRejected("unverified_mask", f"an assistant turn is not in the render: {content[:60]!r}")
            for call in turn.get("tool_calls") or []:
                name = (call.get("function") or call).get("name", "")
                if name not in span:
                    raise RowRejected("unverified_mask", f"the call of tool {name!r} is not in its turn")
        for message in messages:
            if message["role"] in ("assistant", "tool"):  # templates may rewrite tool results as JSON
                continue
            content = (message.get("content") or "").strip()
            if content not in text:
                raise RowRejected("message_not_rendered", f"the template leaves out a {message['role']} message")

    # ---- tokenising -----------------------------------------------------------------------------

    def encode(self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None) -> Example:
        """Renders, tokenises and labels one conversation, whole.

        Raises:
            RowRejected: see `render`; or control tokens in its text can't be kept as text.
        """
        text, spans = self.render(messages, tools, template_kwargs)
        marked = MARK_START in text
        ids, starts, ends = self._tokenise_marked(text) if marked else self._tokenise(text)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        for start, end in spans:
            first = np.searchsorted(starts, start, side="left")
            last = np.searchsorted(ends, end, side="right")  # exclusive
            if last <= first or ends[last - 1] != end:
                raise RowRejected("unverified_mask", "the end of an assistant turn is inside a token")
            labels[first:last] = ids[first:last]
        return Example(ids, labels, marked, self._not_rendered(text, messages, tools))

    @staticmethod
    def _not_rendered(text: str, messages: list[dict], tools: list | None) -> tuple[str, ...]:
        shown = {
            "reasoning_content": [m["reasoning_content"].strip() for m in messages if m.get("reasoning_content")],
            "tools": [str((tool.get("function") or tool).get("name")) for tool in tools or []],
        }
        if any(shown.values()):
            text = MARKED.sub(r"\1", text)
        return tuple(name for name, parts in shown.items() if parts and not any(part in text for part in parts))

    def _tokenise(self, text: str, control_as_text: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and their first and past-the-last character, int32 [T] each. The template wrote the BOS."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = control_as_text
        encoding = backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1]

    def _tokenise_marked(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `_tokenise`, with marked control tokens as plain text; the marks themselves have no token."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

        def add(start: int, end: int, control_as_text: bool) -> None:
            ids, starts, ends = self._tokenise(text[start:end], control_as_text)
            parts.append((ids, starts + np.int32(start), ends + np.int32(start)))

        position = 0
        for match in MARKED.finditer(text):
            add(position, match.start(), control_as_text=False)
            add(*match.span(1), control_as_text=True)
            if self.tokenizer.convert_tokens_to_ids(match[1]) in parts[-1][0]:
                raise RowRejected("control_token_in_text", f"{match[1]!r} can't be tokenised as plain text")
            position = match.end()
        add(position, len(text), control_as_text=False)
        ids, starts, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        if self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) != MARKED.sub(r"\1", text):
            raise RowRejected(
                "control_token_in_text", "this tokenizer can't keep control tokens as plain text exactly"
            )
        return ids, starts, ends


def truncate(example: Example, max_length: int) -> Example:
    """The first `max_length` tokens. A turn cut there keeps its tokens and gets no end-of-turn token.

    Raises:
        RowRejected: no supervised token is left.
    """
    if len(example.input_ids) > max_length:
        ids, labels = example.input_ids[:max_length], example.labels[:max_length]
        example = replace(example, input_ids=ids, labels=labels, is_truncated=True)
    if example.num_supervised == 0:
        raise RowRejected("nothing_left_after_truncation", f"no assistant token within --max_length {max_length}")
    return example
