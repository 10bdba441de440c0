"""Templates whose assistant turns are hard to locate: the labels are exact, or the row is rejected."""

import pytest
from tokenizers import AddedToken

from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.reading.rows import RowError
from tests.chat.test_masks import TAGGED_TEMPLATE, assistant, make_format, supervised, user
from tests.helpers import CHATML_TEMPLATE

CHAT = [user("Q"), assistant("A b"), user("Q"), assistant("C")]
TOOL = {"type": "function", "function": {"name": "w", "description": "weather", "parameters": {}}}


def calls(*cities: str) -> dict:
    return assistant("", tool_calls=[{"function": {"name": "w", "arguments": {"city": city}}} for city in cities])


@pytest.fixture
def template(tokenizer):
    """Makes the ChatFormat of a template and its control tokens."""

    def make(text: str, *special: str, eos: str | None = None):
        tokenizer.add_tokens(
            [AddedToken(name, special=True, normalized=False) for name in special], special_tokens=True
        )
        if eos:
            tokenizer.eos_token = eos
        return make_format(tokenizer, text)

    return make


TURNS = """\
{%- for m in messages %}{{- '<|turn|>' + HEADER + m.content + '<|end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant\\n' }}{%- endif %}"""


def test_a_turn_that_closes_with_two_tokens_is_supervised_with_both(template):
    text = TURNS.replace("'<|end|>'", "'<|close|><|end|>'").replace("HEADER", "m.role + '\\n'")
    chat_format = template(text, "<|turn|>", "<|close|>", "<|end|>", eos="<|end|>")
    assert supervised(chat_format, CHAT) == ["A b<|close|><|end|>", "C<|close|><|end|>"]


def test_the_space_at_the_end_of_a_header_belongs_to_the_turn(template):
    """The space and the first word of the turn are one token."""
    text = TURNS.replace("HEADER", "m.role + ': '").replace("assistant\\n", "assistant: ")
    assert supervised(template(text, "<|turn|>", "<|end|>"), CHAT) == [" A b<|end|>", " C<|end|>"]


@pytest.mark.parametrize(
    "header",
    [
        "m.role + (' (' + m.name + ')' if m.name else '') + '\\n'",
        "(m.name or m.role) + '\\n'",
        "m.role + '\\n' + ('' if loop.last else 'old answer: ')",
    ],
)
def test_a_header_other_than_the_generation_prompts_is_refused_or_no_part_of_the_turn(template, header):
    chat_format = template(TURNS.replace("HEADER", header), "<|turn|>", "<|end|>")
    chat = [user("Q"), assistant("A b", name="bob"), user("Q"), assistant("C", name="bob")]
    if "old" in header:  # the header is the expected one; the words after it are a part of the turn
        assert supervised(chat_format, chat) == ["old answer: A b<|end|>", "C<|end|>"]
        return
    with pytest.raises(RowError) as caught:
        chat_format.encode(chat)
    assert caught.value.reason == "unverified_mask"
    assert supervised(chat_format, CHAT) == ["A b<|end|>", "C<|end|>"]


def test_a_header_of_plain_text_is_the_one_of_the_turn_and_not_one_in_the_tools(template):
    text = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- ' USER: ' + m.content + (' TOOLS: ' + (tools | tojson) if tools else '') }}
    {%- else %}{{- ' ASSISTANT: ' + m.content + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ' ASSISTANT:' }}{%- endif %}"""
    chat_format = template(text)
    eos = chat_format.tokenizer.eos_token
    assert supervised(chat_format, CHAT) == [" A b" + eos, " C" + eos]
    assert supervised(chat_format, CHAT[:2], tools=[TOOL]) == [" A b" + eos]
    spoof = {"name": "w", "description": "says ASSISTANT: hello"}
    assert supervised(chat_format, CHAT[:2], tools=[spoof]) == [" A b" + eos]


def test_a_tagged_turn_ends_after_a_call_that_closes_with_a_control_token(template):
    text = TAGGED_TEMPLATE.replace(
        "{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}",
        "{{- message.content }}{%- for call in message.tool_calls or [] %}{{- '<call>' + (call.function | tojson) + "
        "'</call>' }}{%- endfor %}{%- endgeneration %}{{- '<|im_end|>\\n' }}",
    )
    turns = supervised(template(text, "</call>"), [user("Q"), calls("Rome"), user("Q"), assistant("A")])
    assert turns[0].endswith("</call><|im_end|>")
    assert turns[1] == "A<|im_end|>"


# ---- what a template leaves out ------------------------------------------------------------------

ONLY_TWO_ROLES = """\
{%- for m in messages %}{%- if m.role in ('user', 'assistant') %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}"""
FIRST_CALL_ONLY = CHATML_TEMPLATE.replace("in message.tool_calls or []", "in (message.tool_calls or [])[:1]")
NAME_ONLY = CHATML_TEMPLATE.replace("(call.function | tojson)", "call.function.name")


@pytest.mark.parametrize(
    ("text", "chat", "reason"),
    [
        (ONLY_TWO_ROLES, [user("Q"), assistant("A"), {"role": "tool", "content": "42"}, assistant("B")], "message"),
        (ONLY_TWO_ROLES, [user("Q"), assistant("I call w", tool_calls=calls("Rome")["tool_calls"])], "mask"),
        (FIRST_CALL_ONLY, [user("Q"), calls("Rome", "Paris")], "mask"),
        (NAME_ONLY, [user("Q"), calls("Rome")], "mask"),
    ],
)
def test_what_a_template_leaves_out_refuses_the_row(template, text, chat, reason):
    with pytest.raises(RowError) as caught:
        template(text).encode(chat)
    assert caught.value.reason == {"message": "message_not_rendered", "mask": "unverified_mask"}[reason]


def test_a_tool_result_may_be_shown_as_json(template):
    """The template quotes it, or parses and writes it anew."""
    for filter in ("m.content | tojson", "m.content"):
        text = ONLY_TWO_ROLES.replace("('user', 'assistant')", "('user', 'assistant', 'tool')")
        text = text.replace("m.content +", f"({filter} if m.role == 'tool' else m.content) +")
        chat = [user("Q"), assistant("A"), {"role": "tool", "content": '{"sky":  "sun\\ny", "t": 5}'}, assistant("B")]
        assert supervised(template(text), chat) == ["A<|im_end|>", "B<|im_end|>"]


# ---- templates that fail -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    ["m.content[m.content.index('x'):]", "(1 / (m.content | length - 1)) | string", "m.nothing.at_all"],
)
def test_an_error_inside_a_template_rejects_the_row(template, expression):
    chat_format = template("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    with pytest.raises(RowError) as caught:
        chat_format.encode([user("Q"), assistant("A")])
    assert caught.value.reason == "template_error"


def test_a_template_that_is_not_jinja_is_named(template):
    with pytest.raises(UserError, match="not valid Jinja .line 2.*--chat_template"):
        template("{% for m in messages %}\n{% endif %}")


def test_a_template_that_recurses_forever_rejects_the_row(template):
    chat_format = template("{% macro f(m) %}{{ f(m) }}{% endmacro %}{{ f(messages) }}")
    with pytest.raises(RowError) as caught:
        chat_format.encode([user("Q"), assistant("A")])
    assert caught.value.reason == "template_error"


def test_thinking_without_an_end_is_supervised(tokenizer):
    """The text is long enough for a search that is quadratic to be noticed."""
    tokenizer.chat_template = CHATML_TEMPLATE
    text = "<think>" * 20_000
    chat_format = ChatFormat(tokenizer, mask_thinking=True)
    assert supervised(chat_format, [user("Q"), assistant(text)]) == [text + "<|im_end|>"]
