"""The labels of every model family equal those of the tagged template and transformers' own mask, token by token.

A case is one family and one kind of conversation: its labels are exact, or it is rejected for a named reason.
"""

import json
import random
import re

import numpy as np
import pytest

from dft.chat.format import ChatFormat
from dft.reading.rows import RowError
from examples.make_example_data import WEATHER_TOOL
from tests.chat.families import FAMILIES, Oracle, runs, tokenizer

THOUGHT = "2 x 3 is 6."
TEXTS = [
    "",
    "  ",
    "\n",
    "\n\nline ends first",
    " a space first",
    "spaces last  ",
    "line ends last\n\n",
    "a\n\n\nb",
    "好👍",
]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def calls(*arguments: object, text: str = "", **more) -> dict:
    """An assistant turn that calls the weather tool once for each of the arguments."""
    functions = [{"name": "get_weather", "arguments": value} for value in arguments]
    made = [{"id": f"call{i:05}", "type": "function", "function": f} for i, f in enumerate(functions)]
    return assistant(text, tool_calls=made, **more)


def result(text: str, index: int = 0) -> dict:
    return {"role": "tool", "name": "get_weather", "content": text, "tool_call_id": f"call{index:05}"}


ROME, OSLO = {"city": "Rome"}, {"city": "Oslo"}
SUN = result('{"sky": "sunny"}')
SUNNY = assistant("It is sunny.")
THINKS = assistant("6", reasoning_content=THOUGHT)
INLINE = f"<think>\n{THOUGHT}\n</think>\n\n"
ROWS = {
    "plain": [user("Hi"), assistant("Hello, you.")],
    "system": [system("Be brief."), user("Hi"), assistant("Hello, you.")],
    "multi-turn": [system("Be brief."), user("Hi"), assistant("Hello."), user("And?"), assistant("再见！")],
    "repeated texts": [user("A"), assistant("A"), user("A"), assistant("A"), user("B"), assistant("A")],
    "role names": [user("assistant"), assistant("user"), user("model\n"), assistant("assistant\n\nmodel")],
    "user last": [user("Hi"), assistant("Hello."), user("And?")],
    "assistant first": [assistant("Hello."), user("Hi"), assistant("And?")],
    "users in a row": [user("Hi"), user("You there?"), assistant("Yes.")],
    "assistants in a row": [user("Hi"), assistant("Hello."), assistant("You there?"), user("Yes"), assistant("Good.")],
    "reasoning column": [user("2 x 3?"), THINKS],
    "reasoning column, multi-turn": [user("2 x 3?"), THINKS] * 2,
    "reasoning column, line ends": [user("2 x 3?"), assistant("\n\n6\n", reasoning_content=f"\n{THOUGHT}\n\n")],
    "reasoning in the text": [user("2 x 3?"), assistant(INLINE + "6")],
    "reasoning in the text, multi-turn": [user("2 x 3?"), assistant(INLINE + "6")] * 2,
    "tools": [user("Rome?"), calls(ROME), SUN, SUNNY],
    "tools, multi-turn": [system("Be brief."), user("?"), calls(ROME), SUN, SUNNY, user("!"), calls(OSLO), SUN, SUNNY],
    "tools, same question": [user("?"), calls(ROME), SUN, SUNNY] * 2,
    "tools, in a row": [user("Rome? Oslo?"), calls(ROME), SUN, calls(OSLO), SUN, assistant("Sunny, both.")],
    "tools, empty arguments": [user("Here?"), calls({}), SUN, SUNNY],
    "tools, arguments as text": [user("Rome?"), calls(json.dumps(ROME)), SUN, SUNNY],
    "tools, line ends": [user("Rome?"), calls(ROME), SUN, assistant("\n\nIt is sunny.\n")],
    "tools, white space after a result": [user("Rome?"), calls(ROME), SUN, assistant("\n It is sunny.")],
    "tools, thinking after a result": [user("Rome?"), calls(ROME), SUN, assistant(INLINE + "It is sunny.")],
    "tools, call last": [user("Rome?"), calls(ROME)],
    "tools, result last": [user("Rome?"), calls(ROME), SUN],
    "tools, words and a call": [user("Rome?"), calls(ROME, text="I look."), SUN, SUNNY],
    "tools, words and an empty call": [user("Here?"), calls({}, text="I look."), SUN, SUNNY],
    "tools, words after a result": [user("?"), calls(ROME), SUN, calls(OSLO, text="And there."), SUN, SUNNY],
    "tools, reasoning and a call": [user("Rome?"), calls(ROME, reasoning_content=THOUGHT), SUN, SUNNY],
    "tools, reasoning and an empty call": [user("Here?"), calls({}, reasoning_content=THOUGHT), SUN, SUNNY],
    "tools, reasoning in the text": [user("Rome?"), calls(ROME, text=INLINE), SUN, assistant(INLINE + "Sunny.")],
    "tools, two calls": [user("?"), calls(ROME, OSLO), SUN, result('{"sky": "gray"}', 1), SUNNY],
    "tools, two calls, one empty": [user("?"), calls(ROME, {}), SUN, result('{"sky": "gray"}', 1), SUNNY],
    **{f"answer {text!r}": [user(text + "Q" + text), assistant(text)] * 2 for text in TEXTS},
}
SHOWN_AS = {"tools, arguments as text": "tools"}  # templates are given arguments as objects
# What a family can't show, as (families, rows, reason); every other case is exact
REFUSED = [
    # these show no tool calls, and refuse the turn of a tool where roles must alternate
    ("phi3|phi3_prepend|phi4", "tools.*", "unverified_mask"),
    ("gemma|llama2", "tools, call last", "unverified_mask"),
    ("gemma|llama2", "tools.*", "template_error"),
    ("gemma|llama2|mistral_v3", "(users|assistants) in a row|assistant first", "template_error"),
    # these show the first call alone, or the calls without the words
    ("llama3", "tools, two calls.*", "template_error"),
    ("gpt_oss", "tools, two calls.*", "unverified_mask"),
    ("llama3|mistral_v3|gpt_oss", "tools, words .*", "unverified_mask"),
    # this one asks whether the answer is empty: with an anchor it is not
    ("glm4_thinking", r"answer '( *|\\n)'", "unverified_mask"),
]


def refusal(name: str, row: str) -> str | None:
    """Why a family refuses a row; None where labels are exact."""
    fitting = (reason for names, rows, reason in REFUSED if re.fullmatch(names, name) and re.fullmatch(rows, row))
    return next(fitting, None)


# One conversation as the oracle sees it, with ⟦⟧ around the assistant's text
SHOWN = {
    "qwen2.5": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n⟦D<|im_end|>⟧\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n"
    "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n⟦<think>\nT\n</think>\n\nD<|im_end|>⟧\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nKnowledge ends in December 2023\n\nS"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦B<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nC<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦D<|eot_id|>⟧",
    "mistral_v3": "<s>[INST] A[/INST]⟦ B</s>⟧[INST] S\n\nC[/INST]⟦ D</s>⟧",
    "mistral_v11": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]A[/INST]⟦B</s>⟧[INST]C[/INST]⟦[THINK]T[/THINK]D</s>⟧",
    "gemma": "<bos><start_of_turn>user\nS\n\nA<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>⟧\n"
    "<start_of_turn>user\nC<end_of_turn>\n<start_of_turn>model\n⟦D<end_of_turn>⟧\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nA<|end|>\n<|assistant|>\n⟦B<|end|>⟧\n"
    "<|user|>\nC<|end|>\n<|assistant|>\n⟦D<|end|>⟧\n<|endoftext|>",
    "phi4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>A<|im_end|>"
    "<|im_start|>assistant<|im_sep|>⟦B<|im_end|>⟧<|im_start|>user<|im_sep|>C<|im_end|>"
    "<|im_start|>assistant<|im_sep|>⟦D<|im_end|>⟧",
    "deepseek_v3": "<｜begin▁of▁sentence｜>S<｜User｜>A<｜Assistant｜>⟦B<｜end▁of▁sentence｜>⟧"
    "<｜User｜>C<｜Assistant｜>⟦D<｜end▁of▁sentence｜>⟧",
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nA<|assistant|>⟦\nB<|user|>⟧\nC<|assistant|>⟦\nD⟧",
    "glm4_thinking": "[gMASK]<sop><|system|>\nS<|user|>\nA<|assistant|>\n<think>⟦</think>\nB<|user|>⟧\n"
    "C<|assistant|>\n<think>⟦T</think>\nD⟧",
    "gpt_oss": "<|start|>system<|message|>You are a model.\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final.<|end|><|start|>developer<|message|># Instructions\n\nS\n\n<|end|>"
    "<|start|>user<|message|>A<|end|><|start|>assistant⟦<|channel|>final<|message|>B<|end|>⟧"
    "<|start|>user<|message|>C<|end|><|start|>assistant⟦<|channel|>analysis<|message|>T<|end|>"
    "<|start|>assistant<|channel|>final<|message|>D<|return|>⟧",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST]⟦ B </s>⟧<s>[INST] C [/INST]⟦ D </s>⟧",
    "deepseek_v3_1": "<｜begin▁of▁sentence｜>S<｜User｜>A<｜Assistant｜></think>⟦B<｜end▁of▁sentence｜>⟧"
    "<｜User｜>C<｜Assistant｜></think>⟦D<｜end▁of▁sentence｜>⟧",
    "command_r7b": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Rules\nWrite <|START_RESPONSE|> before a "
    "response.\nS<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>A<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_RESPONSE|>B<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>C<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦<|START_RESPONSE|>D<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "unknown": "◁rule▷\nS◁over▷\n◁ask▷\nA◁over▷\n◁reply▷\n⟦B◁over▷⟧\n◁ask▷\nC◁over▷\n◁reply▷\n⟦(((T)))\nD◁over▷⟧\n",
}
SHOWN |= {"chatml_unmarked": SHOWN["qwen2.5"], "phi3_prepend": SHOWN["phi3"], "deepseek_r1": SHOWN["deepseek_v3"]}


@pytest.fixture(scope="module")
def family():
    """Makes the code under test and the oracle of a family, each once."""
    made = {}

    def get(name: str) -> tuple[ChatFormat, Oracle]:
        if name not in made:
            made[name] = ChatFormat(tokenizer(name)), Oracle(name)
        return made[name]

    return get


def check_exact(
    chat_format: ChatFormat, oracle: Oracle, messages: list[dict], tools: list | None, shown: list[dict]
) -> None:
    """Compares ids and labels with the oracle's of `shown`; compares texts first, so that a failure can be read."""
    ids, labels = oracle.encode(shown, tools)
    example = chat_format.encode(messages, tools)
    assert runs(oracle.tokenizer, example.input_ids, example.labels) == runs(oracle.tokenizer, ids, labels)
    np.testing.assert_array_equal(example.input_ids, ids)
    np.testing.assert_array_equal(example.labels, labels)
    assert not example.has_control_text


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spans_of_the_oracle_are_what_the_assistant_writes(name):
    chat = [system("S"), user("A"), assistant("B"), user("C"), assistant("D", reasoning_content="T")]
    oracle = Oracle(name)
    text, spans = oracle.spans(chat)
    marked = text
    for start, end in reversed(spans):
        marked = f"{marked[:start]}⟦{marked[start:end]}⟧{marked[end:]}"
    assert marked == SHOWN[name]
    assert tokenizer(name).apply_chat_template(chat, tokenize=False) == text


def check_refused(chat_format: ChatFormat, messages: list[dict], tools: list | None, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        chat_format.encode(messages, tools)
    assert caught.value.reason == reason


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_exact_or_the_row_is_refused(family, name, row):
    chat_format, oracle = family(name)
    tools = [WEATHER_TOOL] if row.startswith("tools") else None
    reason = refusal(name, row)
    if reason:
        check_refused(chat_format, ROWS[row], tools, reason)
    else:
        check_exact(chat_format, oracle, ROWS[row], tools, shown=ROWS[SHOWN_AS.get(row, row)])


def random_chat(rng: random.Random, tools: bool) -> list[dict]:
    """A conversation of one to four questions with tricky texts, thinking and tool calls, without control tokens."""
    texts = [*TEXTS, "A", "A", "assistant", "user\n", '{"name": "', "get_weather", "<think>", "<<SYS>> x", "3"]
    arguments = [{}, ROME, OSLO, {"city": ""}, {"n": 3}, {"a": {"b": [1, " x\n", None]}}, {"name": "city"}]

    def turn(*made: object) -> dict:
        text = rng.choice(["", INLINE, "\n" + INLINE]) * (rng.random() < 0.3) + rng.choice(texts)
        more = {"reasoning_content": rng.choice(texts)} if rng.random() < 0.3 else {}
        return calls(*made, text=rng.choice(["", text]), **more) if made else assistant(text, **more)

    chat = [system(rng.choice(texts))] * (rng.random() < 0.4)
    for _ in range(rng.randint(1, 4)):
        chat.append(user(rng.choice(texts)))
        while tools and rng.random() < 0.5:
            made = rng.choices(arguments, k=1 + (rng.random() < 0.3))
            chat += [turn(*made), *(result(rng.choice(texts), i) for i in range(len(made)))]
        chat.append(turn())
    if len(chat) > 2 and rng.random() < 0.2:  # turns may then not alternate, and a result may lack its call
        del chat[rng.randrange(len(chat))]
    return chat


@pytest.mark.parametrize("name", FAMILIES)
def test_random_chats_are_exact_or_refused(family, name):
    chat_format, oracle = family(name)
    rng = random.Random(name)
    exact = 0
    for i in range(60):
        tools = [WEATHER_TOOL] if i % 2 else None
        chat = random_chat(rng, tools=i % 2 == 1)
        try:
            example = chat_format.encode(chat, tools)
        except RowError:
            continue
        ids, labels = oracle.encode(chat, tools)
        assert runs(oracle.tokenizer, example.input_ids, example.labels) == runs(oracle.tokenizer, ids, labels), chat
        assert example.input_ids.tolist() == ids.tolist(), chat
        assert example.labels.tolist() == labels.tolist(), chat
        exact += 1
    assert exact >= 15


def letters(oracle: Oracle) -> dict[str, str]:
    """A harmless stand-in for each control token."""
    return {token: f"Q{chr(97 + i)}q" for i, token in enumerate(oracle.family.control)}


def swap(value: object, table: dict[str, str]) -> object:
    """`value` with every occurrence of a key of the table replaced."""
    text = json.dumps(value, ensure_ascii=False)
    for old in sorted(table, key=len, reverse=True):
        text = text.replace(old, table[old])
    return json.loads(text)


def spoofed_rows(spoof: str, end: str) -> dict[str, list[dict]]:
    """Conversations with a family's own format written into one kind of text."""
    return {
        "user": [user(f"{end}{spoof}"), assistant("A"), user(f"{spoof}I was told to{end}"), assistant("B")],
        "system": [system(spoof), user("Hi"), assistant("A")],
        "assistant": [user("Hi"), assistant(f"{spoof}I was told to"), user("Hi"), assistant(f"{end}{spoof}{end}")],
        "reasoning column": [user("Hi"), assistant("A", reasoning_content=f"{end}{spoof}")],
        "reasoning in the text": [user("Hi"), assistant(f"<think>\n{spoof}\n</think>\n\nA")],
        "tools, result": [user("Rome?"), calls(ROME), result(spoof), SUNNY],
        "tools, arguments": [user("Rome?"), calls({"city": spoof, end: "x"}), SUN, SUNNY],
    }


@pytest.mark.parametrize("row", spoofed_rows("", ""))
@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_text_stay_text(family, name, row):
    chat_format, oracle = family(name)
    messages = spoofed_rows(oracle.spoof(), oracle.family.control[-1])[row]
    tools = [WEATHER_TOOL] if row.startswith("tools") else None
    reason = refusal(name, row)
    if reason:
        return check_refused(chat_format, messages, tools, reason)
    table = letters(oracle)
    harmless = swap(messages, table)
    check_exact(chat_format, oracle, harmless, tools, shown=harmless)

    example, (ids, labels) = chat_format.encode(messages, tools), oracle.encode(harmless, tools)
    assert example.has_control_text == any(word in oracle.spans(harmless, tools)[0] for word in table.values())
    for token in oracle.control_ids:
        assert np.count_nonzero(example.input_ids == token) == np.count_nonzero(ids == token)
        assert np.count_nonzero(example.labels == token) == np.count_nonzero(labels == token)
    supervised = example.labels != -100
    assert (example.labels[supervised] == example.input_ids[supervised]).all()
    texts = swap(runs(oracle.tokenizer, ids, labels), {word: token for token, word in table.items()})
    assert runs(oracle.tokenizer, example.input_ids, example.labels) == texts
