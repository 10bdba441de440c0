"""The chat template of a tokenizer: rendered, checked, and provided where the tokenizer has none."""

import logging
import re

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dft.chat.control_tokens import ControlTokens
from dft.errors import UserError
from dft.reading.messages import REASONING_KEYS

logger = logging.getLogger(__name__)

Span = tuple[int, int]  # the characters [start, end) of a rendered text
# A template is a program that we didn't write; it may raise any of these.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
TAGS = re.compile(r"[ \t]*\{%-?\s*(?:end)?generation\s*-?%\}\n")
CONTENT_IS_NULL = re.compile(r"content(?:['\"]\])?\s+is\s+(?:not\s+)?none\b")
PROBE = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
CALL = {"id": "aBc123xYz", "type": "function", "function": {"name": "probe_tool", "arguments": {"key": "value"}}}
CALLING = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "result", "name": "probe_tool", "tool_call_id": CALL["id"]},
]
PROBES = (PROBE, [{"role": "system", "content": "rules"}, PROBE[0]], CALLING, CALLING[:2])
READ_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", "weight", "train", *REASONING_KEYS}

# HEADER, END and BEGINNING are replaced by tokens that the tokenizer has, see built_in_template
BUILT_IN_TEMPLATE = """\
BEGINNING{%- if tools %}
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


class ChatTemplate:
    """The chat template of one tokenizer, which is given the built-in one if it has none.

    Args:
        template_kwargs: arguments that every conversation is rendered with, unless its own say otherwise.

    Attributes:
        is_built_in: whether the tokenizer had no template, or the built-in one.
        has_tags: whether the template marks the assistant's text by {% generation %} tags.
        source: the text of the template. The tokenizer is given the built-in one without its tags, which only
            transformers can read.
        control: the control tokens that the template may write.

    Raises:
        UserError: there are several templates, the template is not valid Jinja, or none can be built.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs or {}
        if tokenizer.chat_template is not None and not isinstance(tokenizer.chat_template, str):
            raise UserError("the tokenizer has several chat templates: choose one with --chat_template FILE")
        built_in = built_in_template(tokenizer)
        self.is_built_in = built_in is not None and tokenizer.chat_template in (None, TAGS.sub("", built_in))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _given_to(tokenizer, built_in)
        self.source = built_in if self.is_built_in else tokenizer.chat_template
        self._asks_for_null = CONTENT_IS_NULL.search(self.source) is not None
        self.has_tags = GENERATION_TAG.search(self.source) is not None
        self.control = ControlTokens(tokenizer, self.source + "".join(map(self._probe, PROBES)))
        self.reasoning_key = next((key for key in REASONING_KEYS if _reads(self.source, key)), REASONING_KEYS[0])
        if adds_bos(tokenizer) and not self._probe(PROBE).startswith(tokenizer.bos_token):
            logger.warning(
                "The chat template doesn't begin with %s, which this tokenizer puts before other texts: chats are "
                "trained without it, as they are served",
                tokenizer.bos_token,
            )

    def _probe(self, messages: list[dict]) -> str:
        """The text of a small conversation; nothing where the template refuses it."""
        try:
            return self.render(messages, add_generation_prompt=True)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error}): mend it, or give another with "
                "--chat_template FILE"
            ) from error
        except TEMPLATE_ERRORS:
            return ""  # a template may refuse this conversation and accept others

    def with_its_reasoning_key(self, messages: list[dict]) -> list[dict]:
        """The messages with `reasoning_content` under the name that the template reads."""
        key = self.reasoning_key
        if key == REASONING_KEYS[0] or not any(REASONING_KEYS[0] in message for message in messages):
            return messages
        names = {REASONING_KEYS[0]: key}
        return [{names.get(name, name): value for name, value in message.items()} for message in messages]

    def with_null_contents(self, messages: list[dict]) -> list[dict]:
        """The messages with null as the content of calls without words, if the template asks whether it is null.

        DeepSeek-V3's shows calls only then, and R1-Distill-Qwen's writes an empty turn behind them otherwise.
        """
        is_wordless = [bool(message.get("tool_calls")) and not message["content"] for message in messages]
        if not self._asks_for_null or not any(is_wordless):
            return messages
        return [{**m, "content": None} if null else m for m, null in zip(messages, is_wordless, strict=True)]

    def with_system_in_last_question(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None
    ) -> list[dict] | None:
        """The messages with the system's text in the last question; None where the template doesn't put it there.

        Mistral's templates show the system message while a question is the last message, and not behind its answer.
        """
        questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if messages[0]["role"] != "system" or not questions:
            return None
        system, last = messages[0]["content"], questions[-1]
        question = {**messages[last], "content": f"{system}\n\n{messages[last]['content']}"}
        moved = [*messages[1:last], question, *messages[last + 1 :]]
        try:
            prompts = [
                self.render(part, tools, template_kwargs, add_generation_prompt=True)
                for part in (messages[: last + 1], moved[:last])
            ]
        except TEMPLATE_ERRORS:
            return None
        return moved if prompts[0] == prompts[1] else None

    def unread_keys(self, messages: list[dict]) -> set[str]:
        """The keys of messages that neither the trainer reads nor the template, as far as its source tells."""
        keys = set().union(*messages) - READ_KEYS
        return {key for key in keys if not _reads(self.source, re.escape(key))} if keys else keys

    def has_typed_tags(self, messages: list[dict]) -> bool:
        """Whether tags that stand in turns, such as <think>, stand in a text that is not the assistant's."""
        tags = self.control.tags
        if tags is None:
            return False
        return any(message["role"] != "assistant" and tags.search(message["content"]) for message in messages)

    def render(
        self,
        messages: list[dict],
        tools: list | None = None,
        template_kwargs: dict | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Raises:
            TEMPLATE_ERRORS: the template refuses the conversation.
        """
        return self._render(messages, tools, template_kwargs, add_generation_prompt=add_generation_prompt)[0][0]

    def render_tagged(
        self, messages: list[dict], tools: list | None = None, template_kwargs: dict | None = None
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and the span of what each pair of generation tags encloses.

        Raises:
            TEMPLATE_ERRORS: the template refuses the conversation.
        """
        texts, spans = self._render(messages, tools, template_kwargs, return_assistant_tokens_mask=True)
        return texts[0], spans[0]

    def _render(
        self, messages: list[dict], tools: list | None, template_kwargs: dict | None, **settings: bool
    ) -> tuple[list[str], list[list[Span]]]:
        return render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.source,
            **settings,
            **{**self.tokenizer.special_tokens_map, **self.template_kwargs, **(template_kwargs or {})},
        )


def built_in_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The built-in template, with generation tags; None for a tokenizer that has no token which could end a turn.

    ChatML for a tokenizer that has its tokens; for others, ChatML headers in plain text and turns ended by EOS.
    """
    vocab = tokenizer.get_vocab()
    end = "<|im_end|>" if "<|im_start|>" in vocab and "<|im_end|>" in vocab else tokenizer.eos_token
    if end is None:
        return None
    beginning = "{{- bos_token }}\n" if adds_bos(tokenizer) else ""
    text = BUILT_IN_TEMPLATE.replace("BEGINNING", beginning)
    return text.replace("HEADER", "<|im_start|>").replace("END", end)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a BOS token before every text."""
    ids = tokenizer("text")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _given_to(tokenizer: PreTrainedTokenizerBase, built_in: str | None) -> str:
    if built_in is None:
        raise UserError("the tokenizer has neither a chat template nor an end token: give --chat_template FILE")
    end = "<|im_end|>" if "<|im_end|>" in built_in else tokenizer.eos_token
    logger.warning("The tokenizer has no chat template: using the built-in ChatML one, turns end with %s", end)
    return TAGS.sub("", built_in)


def _reads(source: str, key: str) -> bool:
    """Whether a template reads a key of a message."""
    return re.search(rf"\.{key}\b|['\"]{key}['\"]", source) is not None
