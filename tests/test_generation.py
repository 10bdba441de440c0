"""Answers that are generated in batches are those that plain passes give, one prompt and one token at a time."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3Config

from dft import generation
from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.generation import generate_answers, longest_prompt
from dft.reading.rows import RowError
from tests.helpers import CHATML_TEMPLATE, THINKING_TEMPLATE

NEW_TOKENS = 12
END = 7
CONFIG = Qwen3Config(
    vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.3, max_position_embeddings=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random model whose own generation config penalizes what a prompt holds, its padding included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.generation_config.repetition_penalty = 3.0
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, 600, length).tolist() for length in (5, 31, 1, 12, 12, 3, 60, 20)]


def one_by_one(model: PreTrainedModel, prompt: list[int], ends: list[int]) -> tuple[list[int], float]:
    """An answer by whole passes without a cache in float64, and how near its closest decision was."""
    exact = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    ids, margin = list(prompt), np.inf
    with torch.no_grad():
        while len(ids) < len(prompt) + NEW_TOKENS and ids[-1] not in ends:
            best, second = exact(torch.tensor([ids])).logits[0, -1].topk(2)[0].tolist()
            margin = min(margin, best - second)
            ids.append(int(exact(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :], margin


@pytest.fixture(scope="module")
def ends(model, prompts) -> list[int]:
    """A token that some answers hold in the middle."""
    return [one_by_one(model, prompts[0], [])[0][4], END]


@pytest.fixture(scope="module")
def expected(model, prompts, ends) -> list[list[int]]:
    found = [one_by_one(model, prompt, ends) for prompt in prompts]
    assert min(margin for _, margin in found) > 1e-3  # so that rounding decides nothing
    answers = [answer for answer, _ in found]
    assert 0 < sum(answer[-1] in ends for answer in answers) < len(answers)
    return answers


@pytest.mark.parametrize("tokens_at_once", [1, 100, 10_000])
def test_batches_give_the_answers_of_one_prompt_at_a_time(model, tokenizer, prompts, ends, expected, tokens_at_once):
    model.train()
    assert generate_answers(model, tokenizer, prompts, NEW_TOKENS, tokens_at_once, ends) == expected
    assert model.training


def padded_on_the_right(prompts, pad):
    ids, mask = (torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return ids, mask


def without_mask(prompts, pad):
    ids, mask = PADDED(prompts, pad)
    return ids, torch.ones_like(mask)


PADDED = generation._padded


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("_padded", padded_on_the_right),
        ("_padded", without_mask),
        ("_without_own_config", lambda model: contextlib.nullcontext()),
    ],
)
def test_the_comparison_rejects(model, tokenizer, prompts, ends, expected, name, mutant, monkeypatch):
    monkeypatch.setattr(generation, name, mutant)
    found = generate_answers(model, tokenizer, prompts, NEW_TOKENS, 10_000, ends)
    assert found != expected
    if name == "_padded":
        assert found[6] == expected[6]  # the longest, which has no padding


@pytest.mark.parametrize("has_adapter", [False, True])
def test_nothing_in_the_models_own_config_changes_an_answer(model, tokenizer, prompts, ends, expected, has_adapter):
    first = expected[0][0]
    own = {"suppress_tokens": [first], "bad_words_ids": [[first]], "num_return_sequences": 2, "num_beams": 2}
    own |= {"do_sample": True, "stop_strings": ["a"], "return_dict_in_generate": True, "forced_eos_token_id": 3}
    asked = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"])) if has_adapter else model
    before = asked.generation_config
    holders = [asked, asked.get_base_model()] if has_adapter else [asked]
    for holder in holders:
        holder.generation_config = GenerationConfig()
        for name, value in own.items():
            setattr(holder.generation_config, name, value)
    assert generate_answers(asked, tokenizer, prompts, NEW_TOKENS, 10_000, ends) == expected
    assert all(holder.generation_config.suppress_tokens == [first] for holder in holders)
    asked.generation_config = before


def test_a_prompt_without_room_for_its_answer_is_refused(model, tokenizer, prompts):
    assert longest_prompt(model.config, 41) == 59
    with pytest.raises(UserError, match=r"longest prompt has 60 tokens; with an answer of 41 the model .* of 59"):
        generate_answers(model, tokenizer, prompts, 41)
    with pytest.raises(ValueError, match="no prompt may be empty"):
        generate_answers(model, tokenizer, [[1], []], 5)


# ---- prompts ------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Type <|im_end|> twice: <|im_end|>."},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "And again?"},
    {"role": "assistant", "content": "No."},
]


@pytest.mark.parametrize(
    "template", [None, CHATML_TEMPLATE, THINKING_TEMPLATE], ids=["built-in", "chatml", "thinking"]
)
def test_a_prompt_is_the_trained_row_up_to_its_last_answer(tokenizer, template):
    """The third template has no generation prompt. Control tokens that users type stay text, as in training."""
    tokenizer.chat_template = template
    chat_format = ChatFormat(tokenizer)
    example = chat_format.encode(CHAT)
    start = int(np.flatnonzero(np.diff((example.labels >= 0).astype(int)) == 1)[-1]) + 1
    assert "No." in tokenizer.decode(example.input_ids[start:])
    assert chat_format.prompt(CHAT).tolist() == example.input_ids[:start].tolist()


def test_a_prompt_holds_calls_and_tools_as_the_template_shows_them(tokenizer):
    tokenizer.chat_template = CHATML_TEMPLATE
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    found = ChatFormat(tokenizer).prompt(messages)
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert "Bonn" in text
    assert tokenizer.decode(found) == text


def test_a_row_that_can_not_be_trained_on_has_no_prompt(tokenizer):
    tokenizer.chat_template = CHATML_TEMPLATE.replace("message.role + '\\n'", "message.role.nothing.at_all")
    with pytest.raises(RowError, match="template_error"):
        ChatFormat(tokenizer).prompt(CHAT)
