"""The chat template of a tokenizer: rendered, checked, and provided where the tokenizer has none."""

import logging
import re

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dft.chat.control_tokens import ControlTokens
from dft.errors import UserError

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
PROBE = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]

# HEADER and END are replaced by tokens that the tokenizer has, see built_in_template
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


class ChatTemplate:
    """The chat template of one tokenizer, which is given the built-in one if it has none.

    Attributes:
        is_built_in: whether the tokenizer had no template.
        has_tags: whether the template marks the assistant's text by {% generation %} tags.
        control: the control tokens that the template may write.

    Raises:
        UserError: there are several templates, the template is not valid Jinja, or none can be built.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.is_built_in = tokenizer.chat_template is None
        if self.is_built_in:
            tokenizer.chat_template = built_in_template(tokenizer)
        if not isinstance(tokenizer.chat_template, str):
            raise UserError("the tokenizer has several chat templates: choose one with --chat_template FILE")
        self.has_tags = GENERATION_TAG.search(tokenizer.chat_template) is not None
        self.control = ControlTokens(tokenizer)
        self._check_syntax()

    def _check_syntax(self) -> None:
        try:
            self.render(PROBE)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error}): mend it, or give another with "
                "--chat_template FILE"
            ) from error
        except TEMPLATE_ERRORS:
            pass  # a template may refuse this conversation and accept others

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
            chat_template=self.tokenizer.chat_template,
            **settings,
            **{**self.tokenizer.special_tokens_map, **(template_kwargs or {})},
        )


def built_in_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for a tokenizer that has its tokens; for others, ChatML headers in plain text and turns ended by EOS.

    Raises:
        UserError: the tokenizer has no token that could end a turn.
    """
    vocab = tokenizer.get_vocab()
    if "<|im_start|>" in vocab and "<|im_end|>" in vocab:
        end = "<|im_end|>"
    elif tokenizer.eos_token is not None:
        end = tokenizer.eos_token
    else:
        raise UserError("the tokenizer has neither a chat template nor an end token: give --chat_template FILE")
    logger.warning("The tokenizer has no chat template: using the built-in ChatML one, turns end with %s", end)
    return BUILT_IN_TEMPLATE.replace("HEADER", "<|im_start|>").replace("END", end)
