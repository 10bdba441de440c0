"""What the assistant said is supervised, or counted, or the row is refused; nothing is left out in silence."""

import json

import pytest
from jinja2 import Environment
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from dft.chat import text_encoder
from dft.chat.format import ChatFormat
from dft.chat.remarks import EMPTY_TURN, SYSTEM_IN_LAST_QUESTION, TURN_WITHOUT_THINKING, TYPED_TAGS, UNREAD_KEY
from dft.chat.tool_calls import with_short_ids
from dft.chat.verification import split_thinking
from dft.config.data import DataConfig
from dft.errors import UserError
from dft.reading.formats import RowReader
from dft.reading.rows import Conversation, RawRow, RejectedRow, RowError
from examples.make_example_data import WEATHER_TOOL
from tests.chat.test_masks import END, assistant, make_format, supervised, system, user
from tests.helpers import CHATML_TEMPLATE, THINKING_TEMPLATE

# Of the kind of DeepSeek-R1's: what stands before </think> is dropped in every turn
R1_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
THOUGHT = "2 x 3 is 6."
BLOCK = f"<think>\n{THOUGHT}\n</think>\n\n"


def read(row: dict, data_format: str = "messages") -> Conversation | RejectedRow:
    return RowReader("rows.jsonl", data_format, {}).read(RawRow(1, json.dumps(row)))


def call(**more) -> dict:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}, **more}


# ---- thinking and prose --------------------------------------------------------------------------


@pytest.mark.parametrize("template", [THINKING_TEMPLATE, R1_TEMPLATE])
@pytest.mark.parametrize(
    "text",
    ["Close it with </think> and go on.", "Write <think>, then </think>.", "a </think>\nb", "x<think>y</think>z"],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_prose_that_a_template_cuts_at_a_thinking_tag_is_refused(tokenizer, template, text, is_last):
    chat = [user("How?"), assistant(text), user("And?"), assistant("Done.")]
    with pytest.raises(RowError, match="not in the render, or not whole") as caught:
        make_format(tokenizer, template).encode(chat[:2] if is_last else chat)
    assert caught.value.reason == "unverified_mask"


def test_prose_with_a_thinking_tag_is_trained_where_the_template_keeps_it(tokenizer):
    text = "Close it with </think> and go on."
    example = make_format(tokenizer, CHATML_TEMPLATE).encode([user("How?"), assistant(text)])
    assert supervised(make_format(tokenizer, CHATML_TEMPLATE), [user("How?"), assistant(text)]) == [text + END]
    assert example.remarks == ()


@pytest.mark.parametrize(
    "turn",
    [assistant(BLOCK + "6"), assistant(f"{THOUGHT}\n</think>\n\n6"), assistant("6", reasoning_content=THOUGHT)],
)
@pytest.mark.parametrize(("template", "kept"), [(THINKING_TEMPLATE, 1), (R1_TEMPLATE, 0)])
def test_turns_without_their_thinking_are_counted(tokenizer, template, kept, turn):
    """The one template keeps the thinking after the last question, the other none."""
    chat = [user("2 x 3?"), turn] * 3
    assert make_format(tokenizer, template).encode(chat).remarks == (TURN_WITHOUT_THINKING,) * (3 - kept)


@pytest.mark.parametrize("turn", [assistant(BLOCK), assistant("", reasoning_content=THOUGHT)])
def test_a_turn_of_which_only_the_end_is_left_is_counted_as_empty_too(tokenizer, turn):
    chat = [user("2 x 3?"), turn, user("2 x 3?"), assistant("6")]
    chat_format = make_format(tokenizer, THINKING_TEMPLATE)
    assert supervised(chat_format, chat)[0] == END
    assert chat_format.encode(chat).remarks == (EMPTY_TURN, TURN_WITHOUT_THINKING)


def test_thinking_is_not_counted_where_it_is_not_supervised(tokenizer):
    tokenizer.chat_template = R1_TEMPLATE
    chat = [user("2 x 3?"), assistant(BLOCK + "6")] * 3
    assert ChatFormat(tokenizer, train_on="last").encode(chat).remarks == (TURN_WITHOUT_THINKING,)
    assert ChatFormat(tokenizer, mask_thinking=True).encode(chat).remarks == ()
    unweighted = [*chat[:5], assistant(BLOCK + "6", weight=0.0)]
    assert ChatFormat(tokenizer).encode(unweighted).remarks == (TURN_WITHOUT_THINKING,) * 2


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("\n<think>\na\n</think>\n\nb</think>c", ("a", "b</think>c")),
        ("a\nb\n</think>\n\nc", ("a\nb", "c")),
        ("a\n</think>", ("a", "")),
        ("a</think>b", None),
        ("a\n</think> b", None),
        ("a <think>b</think>", None),
        ("a <think>\n</think>\nb", None),
        ("a", None),
    ],
)
def test_thinking_stands_at_the_beginning_between_tags_or_before_a_tag_on_a_line_of_its_own(content, parts):
    assert split_thinking(content) == parts


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read_by_template", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_shown_whatever_it_is_called(tokenizer, key, read_by_template):
    row = read({"messages": [user("2 x 3?"), assistant("6", **{key: THOUGHT})]})
    template = THINKING_TEMPLATE.replace("reasoning_content", read_by_template)
    assert supervised(make_format(tokenizer, template), row.messages) == [f"{BLOCK}6{END}"]
    assert make_format(tokenizer, CHATML_TEMPLATE).encode(row.messages).remarks == (TURN_WITHOUT_THINKING,)


def test_two_different_reasonings_are_malformed_and_equal_or_empty_ones_are_one():
    for same in ({"thinking": "a"}, {"thinking": " a\n"}, {"thinking": ""}, {"reasoning": None}, {"thinking": True}):
        (_, turn) = read({"messages": [user("Q"), assistant("A", reasoning_content="a", **same)]}).messages
        assert turn["reasoning_content"] == "a"
    rejected = read({"messages": [user("Q"), assistant("A", reasoning="a", thinking="b")]})
    assert "different texts under 'reasoning' and 'thinking'" in rejected.detail


# ---- the generation prompt -----------------------------------------------------------------------


def test_what_the_generation_prompt_opens_is_not_supervised(tokenizer):
    always_thinking = THINKING_TEMPLATE + (
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    chat = [user("2 x 3?"), assistant("6", reasoning_content=THOUGHT)]
    turns = supervised(make_format(tokenizer, always_thinking), chat * 2)
    assert turns == [f"6{END}", f"{THOUGHT}\n</think>\n\n6{END}"]


def test_arguments_of_the_chat_template_hold_for_all_rows_and_a_rows_own_take_precedence(tokenizer):
    tokenizer.chat_template = CHATML_TEMPLATE.replace(
        "{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        "{{- '<|im_start|>assistant\\n' + ('' if thinks else '<think></think>') }}{%- endif %}",
    ).replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content }}",
        "{{- '<|im_start|>' + message.role + '\\n' + ('<think></think>' if message.role == 'assistant' else '') }}"
        "{{- message.content }}",
    )
    config = DataConfig(data_files=["x"], chat_template_kwargs='{"thinks": true}')
    chat_format = ChatFormat.of(tokenizer, config)
    chat = [user("Q"), assistant("A")]
    assert supervised(chat_format, chat) == [f"<think></think>A{END}"]
    assert supervised(chat_format, chat, template_kwargs={"thinks": False}) == [f"A{END}"]
    assert chat_format.settings != ChatFormat.of(tokenizer, DataConfig(data_files=["x"])).settings


@pytest.mark.parametrize(("text", "word"), [("{", "not JSON"), ("[1]", "JSON object"), ('{"tools": []}', "'tools'")])
def test_bad_arguments_of_the_chat_template_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        DataConfig(data_files=["x"], chat_template_kwargs=text)


def test_a_message_that_becomes_two_turns_is_refused(tokenizer):
    """Of the kind of R1-Distill-Qwen's, which writes the words of a turn behind its calls, as a turn of their own."""
    tokenizer.add_tokens([AddedToken("<call>", special=True, normalized=False)], special_tokens=True)
    tokenizer.eos_token = END
    template = """\
{%- for m in messages %}
    {%- if m.tool_calls %}
        {{- '<|im_start|>bot:' }}
        {%- for c in m.tool_calls %}{{- '<call>' + c.function.name + c.function.arguments | tojson }}{%- endfor %}
        {{- '<|im_end|>' }}
    {%- endif %}
    {%- if m.content is not none %}
        {{- '<|im_start|>' + ('bot' if m.role == 'assistant' else m.role) + ':' + m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>bot:' }}{%- endif %}"""
    chat_format = make_format(tokenizer, template)
    with pytest.raises(RowError, match="message 1 as several turns"):
        chat_format.encode([user("Rome?"), assistant("I look.", tool_calls=[call()])], [WEATHER_TOOL])
    wordless = [user("Rome?"), assistant("", tool_calls=[call()]), {"role": "tool", "content": "sunny"}]
    for chat in (wordless[:2], wordless):
        assert supervised(chat_format, chat) == ['<call>get_weather{"city": "Rome"}' + END]
        assert chat_format.render(chat).text.count("<|im_start|>bot:") == 1  # no empty turn behind the calls


AFTER_A_RESULT = """\
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{- '<|result|>' + m.content + '<|result_end|>' }}
    {%- elif m.role == 'user' %}{{- '<|turn|>user:' + m.content + '<|end|>' }}
    {%- else %}
        {{- '<|turn|>bot:' + m.content if not m.tool_calls }}
        {%- for c in m.tool_calls or [] %}
            {{- '<|turn|>bot:<|call|>' + c.function.name + c.function.arguments | tojson + '<|call_end|>' }}
        {%- endfor %}
        {{- '<|end|>' if not m.tool_calls else '<|result|>' if loop.last }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role == 'user' %}{{- '<|turn|>bot:' }}{%- endif %}"""


def test_turns_around_the_result_of_a_tool(tokenizer):
    """A call ends where generation stops; a header that no generation prompt writes is no part of a turn."""
    names = "<|turn|> <|end|> <|call|> <|call_end|> <|result|> <|result_end|>".split()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    chat_format = make_format(tokenizer, AFTER_A_RESULT)
    chat = [
        user("Rome?"),
        assistant("", tool_calls=[call()]),
        {"role": "tool", "content": "sunny"},
        assistant("Sunny."),
    ]
    made = '<|call|>get_weather{"city": "Rome"}<|call_end|><|result|>'
    assert supervised(chat_format, chat) == [made, "Sunny.<|end|>"]
    assert supervised(chat_format, chat[:2]) == [made]


def test_tags_with_a_gap_between_them_are_one_turn(tokenizer):
    template = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- m.reasoning_content or '' }}{%- endgeneration %}
        {{- '\\n' }}
        {%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}"""
    chat = [user("Q"), assistant("A", reasoning_content="T"), user("Q"), assistant("B")]
    assert supervised(make_format(tokenizer, template), chat) == ["T\nA" + END, "\nB" + END]


# ---- typed tags and keys -------------------------------------------------------------------------


def test_tags_that_a_user_types_are_counted_and_stay_tokens(tokenizer):
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    chat_format = make_format(tokenizer, THINKING_TEMPLATE)
    typed, answer = user("What does </think> mean?"), assistant("It ends.", reasoning_content=THOUGHT)
    assert chat_format.encode([typed, answer]).remarks == (TYPED_TAGS,)
    assert chat_format.encode([user("What?"), answer]).remarks == ()


def test_added_words_and_signs_that_a_template_has_too_are_no_control_tokens(tokenizer):
    tokenizer.add_tokens(
        [AddedToken(word, special=False, normalized=False) for word in ("user", "\n\n", "...", "<t>")]
    )
    chat_format = make_format(tokenizer, CHATML_TEMPLATE + "{# ... <t> #}")
    assert set(chat_format.template.control.ids) - set(tokenizer.all_special_tokens) == {"<t>"}


def test_keys_that_nobody_reads_are_counted(tokenizer):
    chat = [user("Q") | {"mood": "sad"}, assistant("A") | {"mood": "sad", "score": 3, "weight": 1.0, "name": "x"}]
    remarks = make_format(tokenizer, CHATML_TEMPLATE).encode(chat).remarks
    assert sorted(remarks) == [UNREAD_KEY + "mood", UNREAD_KEY + "score"]
    reads_mood = CHATML_TEMPLATE.replace("+ message.content }}", "+ message.content + (message['mood'] or '') }}")
    assert make_format(tokenizer, reads_mood).encode(chat).remarks == (UNREAD_KEY + "score",)


# ---- empty turns, calls, tools -------------------------------------------------------------------

HALF_EMPTY = [user("Q"), assistant("  "), user("Q"), assistant("B")]


def test_empty_turns_are_kept_and_counted_or_not_supervised_or_drop_the_row(tokenizer):
    tokenizer.chat_template = CHATML_TEMPLATE
    kept = ChatFormat(tokenizer)
    assert supervised(kept, HALF_EMPTY) == ["  " + END, "B" + END]
    assert kept.encode(HALF_EMPTY).remarks == (EMPTY_TURN,)
    skipping = ChatFormat(tokenizer, empty_turns="skip_turn")
    assert supervised(skipping, HALF_EMPTY) == ["B" + END]
    assert skipping.encode(HALF_EMPTY).remarks == ()
    with pytest.raises(RowError) as caught:
        ChatFormat(tokenizer, empty_turns="drop_row").encode(HALF_EMPTY)
    assert caught.value.reason == "empty_turn"
    unasked = [*HALF_EMPTY[:1], assistant("", weight=0.0), *HALF_EMPTY[2:]]
    assert supervised(ChatFormat(tokenizer, empty_turns="drop_row"), unasked) == ["B" + END]


def test_a_template_that_asks_whether_an_answer_is_empty_is_exact(tokenizer):
    template = """\
{%- for m in messages %}{{- '<|turn|>' + m.role + ':' + (m.content or '(nothing)') + '<|end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn|>assistant:' }}{%- endif %}"""
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|turn|>", "<|end|>")], True)
    chat = [user("Q"), assistant(""), user("Q"), assistant("B")]
    assert supervised(make_format(tokenizer, template), chat) == ["(nothing)<|end|>", "B<|end|>"]


def test_a_function_call_is_a_tool_call():
    function = call()["function"]
    old = [
        user("Rome?"),
        {"role": "assistant", "content": "", "function_call": function},
        {"role": "function", "name": "get_weather", "content": "sunny"},
        assistant("Sunny."),
    ]
    row = read({"messages": old, "functions": [WEATHER_TOOL["function"]]})
    assert row.messages[1] == assistant("", tool_calls=[call()])
    assert row.messages[2]["role"] == "tool"
    assert row.tools == [WEATHER_TOOL]
    assert read({"messages": [user("Q"), assistant("A", function_call=None)]}).messages[1] == assistant("A")
    both = assistant("", function_call=function, tool_calls=[call()])
    assert "both 'tool_calls' and 'function_call'" in read({"messages": [user("Q"), both]}).detail
    assert "function name" in read({"messages": [user("Q"), assistant("A", function_call={"x": 1})]}).detail


def test_no_tool_calls_are_as_if_absent(tokenizer):
    picky = CHATML_TEMPLATE.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{{- message.tool_calls[0].function.name if 'tool_calls' in message }}",
        1,
    )
    row = read({"messages": [user("Q"), assistant("A", tool_calls=[])]})
    assert supervised(make_format(tokenizer, picky), row.messages) == ["A" + END]


@pytest.mark.parametrize("data_format", ["messages", "sharegpt"])
def test_bare_functions_become_tools(data_format):
    bare = WEATHER_TOOL["function"]
    column = {"messages": "messages", "sharegpt": "conversations"}[data_format]
    for tools in ([bare, WEATHER_TOOL], json.dumps([bare, WEATHER_TOOL])):
        row = read({column: [user("Q"), assistant("A")], "tools": tools}, data_format)
        assert row.tools == [WEATHER_TOOL, WEATHER_TOOL]
    other = [{"type": "web_search"}, {"name": 3}]
    assert read({column: [user("Q"), assistant("A")], "tools": other}, data_format).tools == other


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_system_message_is_as_if_absent(text):
    chat = [user("Q"), assistant("A")]
    assert read({"messages": [system(text), *chat]}).messages == chat
    assert read({"conversations": chat, "system": text}, "sharegpt").messages == chat
    assert read({"messages": [chat[0], system(text), chat[1]]}).messages == [chat[0], system(text), chat[1]]


def test_ids_of_nine_letters_are_made_for_calls_that_have_none_or_others():
    def ids(chat):
        return [[c["id"] for c in m["tool_calls"]] if "tool_calls" in m else m.get("tool_call_id") for m in chat]

    def result(**more):
        return {"role": "tool", "content": "sunny", **more}

    long = [
        user("?"),
        assistant("", tool_calls=[call(id="call_1234567890"), call(id="abcdefgh1"), call()]),
        result(tool_call_id="abcdefgh1"),
        result(tool_call_id="call_1234567890"),
        result(),
        assistant("", tool_calls=[call()]),
        result(),
    ]
    made = ids(with_short_ids(long))
    first, kept, third = made[1]
    assert kept == "abcdefgh1"
    assert made[2:5] == [kept, first, third]
    assert made[6] == made[5][0]
    assert len({first, kept, third, made[6]}) == 4
    assert all(len(made_id) == 9 and made_id.isalnum() for made_id in (first, third, made[6]))
    assert ids(with_short_ids(long)) == made


def test_rows_without_ids_are_trained_with_a_template_that_wants_them(tokenizer):
    picky = CHATML_TEMPLATE.replace(
        "{{- '<tool_call>",
        "{%- if (call.id or '') | length != 9 %}{{- raise_exception('nine letters') }}{%- endif %}{{- '<tool_call>",
    )
    chat = [
        user("Rome?"),
        assistant("", tool_calls=[call()]),
        {"role": "tool", "content": "sunny"},
        assistant("Sunny."),
    ]
    assert len(supervised(make_format(tokenizer, picky), chat, tools=[WEATHER_TOOL])) == 2


def test_calls_that_a_template_does_not_show_are_refused_with_a_remedy(tokenizer):
    without_calls = CHATML_TEMPLATE.replace("in message.tool_calls or []", "in []")
    for text in ("", "I look."):
        with pytest.raises(RowError, match="doesn't show the call.*--chat_template FILE"):
            make_format(tokenizer, without_calls).encode([user("Rome?"), assistant(text, tool_calls=[call()])])


# Of the kind of Mistral's: the system message is shown before the last question, where that is the last message
SYSTEM_AT_THE_END = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
    {%- if m.role == 'user' %}
        {{- '[INST]' + (system + '\\n\\n' if system and loop.last else '') + m.content + '[/INST]' }}
    {%- else %}{{- m.content + eos_token }}{%- endif %}
{%- endfor %}"""


def test_a_system_message_is_shown_where_the_template_shows_it_at_inference(tokenizer):
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("[INST]", "[/INST]")], True)
    chat_format = make_format(tokenizer, SYSTEM_AT_THE_END)
    chat = [system("Be brief."), user("A"), assistant("B"), user("C"), assistant("D")]
    eos = tokenizer.eos_token
    assert chat_format.render(chat).text == f"[INST]A[/INST]B{eos}[INST]Be brief.\n\nC[/INST]D{eos}"
    assert supervised(chat_format, chat) == ["B" + eos, "D" + eos]
    assert chat_format.encode(chat).remarks == (SYSTEM_IN_LAST_QUESTION,)
    never = SYSTEM_AT_THE_END.replace("loop.last", "false")
    with pytest.raises(RowError) as caught:
        make_format(tokenizer, never).encode(chat)
    assert caught.value.reason == "message_not_rendered"


# ---- the built-in template -----------------------------------------------------------------------


@pytest.fixture
def adding_bos(tokenizer):
    """A tokenizer that puts <s> before every text."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=bos)
    tokenizer.chat_template = None
    return tokenizer


def test_the_built_in_template_writes_the_bos_that_the_tokenizer_adds(adding_bos, tokenizer):
    assert adding_bos("a")["input_ids"][0] == adding_bos.bos_token_id
    example = ChatFormat(adding_bos).encode([user("Q"), assistant("A")])
    assert example.input_ids.tolist().count(adding_bos.bos_token_id) == 1
    assert example.input_ids[0] == adding_bos.bos_token_id


def test_a_template_without_the_bos_that_the_tokenizer_adds_is_warned_of(adding_bos, caplog):
    adding_bos.chat_template = CHATML_TEMPLATE
    ChatFormat(adding_bos)
    assert "doesn't begin with <s>" in caplog.text
    caplog.clear()
    adding_bos.chat_template = "{{- bos_token }}" + CHATML_TEMPLATE
    ChatFormat(adding_bos)
    assert not caplog.text


def test_the_built_in_template_is_kept_as_plain_jinja_and_found_again(tokenizer):
    tokenizer.chat_template = None
    before = ChatFormat(tokenizer)
    chat = [user("Q"), assistant("A", reasoning_content="T", tool_calls=[call()]), user("Q"), assistant("B")]
    plain = Environment()
    plain.policies["json.dumps_kwargs"] = {}
    text = plain.from_string(tokenizer.chat_template).render(messages=chat, tools=[WEATHER_TOOL])
    assert text == before.render(chat, [WEATHER_TOOL]).text
    again = ChatFormat(tokenizer)
    assert again.method == "built-in template"
    assert again.encode(chat).labels.tolist() == before.encode(chat).labels.tolist()


def test_the_time_for_a_long_text_does_not_grow_with_its_square(tokenizer, monkeypatch):
    """Taking marks out of a text happens a few times for each text, not once for each of its tokens."""
    calls = []

    def counting(segment: str, plain=text_encoder._plain) -> str:
        calls.append(segment)
        return plain(segment)

    monkeypatch.setattr(text_encoder, "_plain", counting)
    # a header of plain text stands in the middle of a segment, so tokens before it are counted by their offsets
    template = """\
{%- for m in messages %}{{- ('USER: ' if m.role == 'user' else 'ASSISTANT:') + m.content + eos_token }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
    chat_format = make_format(tokenizer, template)
    calls.clear()
    chat = [user("Q"), assistant("\n" + "Yes, of course. " * 2000)]
    assert len(chat_format.encode(chat).input_ids) > 2000
    assert len(calls) < 20
