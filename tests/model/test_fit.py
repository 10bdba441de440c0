"""A model that has too few rows in its embedding, or too few positions, for the rows of a run."""

import logging

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    Gemma3Config,
    GPT2Config,
    GPTJConfig,
    JambaConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
    XGLMConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from data_utils import prepare_data
from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.errors import UserError
from dft.model.fit import check_fit, check_positions, check_vocabulary, has_position_table, tokenizer_size
from dft.model.resizing import add_rows
from examples.make_tiny_model import make_model
from tests.helpers import CHATML_TEMPLATE, write_jsonl

# ---- tokens -------------------------------------------------------------------------------------


@pytest.fixture
def grown(tokenizer):
    """A tokenizer of 603 tokens, for a model of 600."""
    assert len(tokenizer) == 600
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.add_tokens(["zebra", "yak", "xerus"])
    return tokenizer


def prepared(tokenizer, tmp_path, train: list[str], evaluation: list[str]):
    files = {
        name: write_jsonl(
            tmp_path / f"{name}.jsonl",
            [
                {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}]}
                for text in texts
            ],
        )
        for name, texts in {"train": train, "evaluation": evaluation}.items()
    }
    config = DataConfig([str(files["train"])], [str(files["evaluation"])], data_cache_dir=str(tmp_path / "cache"))
    return prepare_data(config, ChatFormat(tokenizer), progress=False)


@pytest.mark.parametrize("is_padded", [True, False])
def test_tokens_that_do_not_occur_need_no_row(grown, tmp_path, caplog, is_padded):
    caplog.set_level(logging.INFO)
    data = prepared(grown, tmp_path, ["a horse", "a cow"], ["a dog"])
    assert data.ids_from(600) == []
    check_fit(data, Qwen3Config(vocab_size=600), grown, is_padded=is_padded, grows=False)
    assert "3 tokens beyond the model's embedding; none occurs in the data" in caplog.text


@pytest.mark.parametrize("side", ["train", "evaluation"])
def test_tokens_without_a_row_are_named_wherever_they_occur(grown, tmp_path, side):
    texts = {"train": ["a horse"], "evaluation": ["a dog"]}
    texts[side] += ["one zebra", "two xerus, one zebra"]
    data = prepared(grown, tmp_path, **texts)
    assert data.ids_from(600) == [600, 602]
    with pytest.raises(UserError, match=r"600 rows.*: zebra \(600\), xerus \(602\)\. .*--resize_embeddings True"):
        check_fit(data, Qwen3Config(vocab_size=600), grown, is_padded=False, grows=False)
    check_fit(data, Qwen3Config(vocab_size=600), grown, is_padded=False, grows=True)
    check_fit(data, Qwen3Config(vocab_size=603), grown, is_padded=False, grows=False)
    with pytest.raises(UserError, match=r": xerus \(602\)\. "):
        check_fit(data, Qwen3Config(vocab_size=602), grown, is_padded=False, grows=False)


def test_a_padding_token_without_a_row_is_refused_where_batches_are_padded(grown):
    grown.add_special_tokens({"pad_token": "<pad>"})
    check_vocabulary(Qwen3Config(vocab_size=600), grown, lambda _: [], is_padded=False)
    with pytest.raises(UserError, match=r"<pad> \(603\)"):
        check_vocabulary(Qwen3Config(vocab_size=600), grown, lambda _: [], is_padded=True)


def test_many_tokens_are_counted(grown):
    grown.add_tokens([f"animal{i}" for i in range(9)])
    with pytest.raises(UserError, match=r"xerus \(602\), animal0 \(603\), animal1 \(604\) and 7 more"):
        check_vocabulary(Qwen3Config(vocab_size=600), grown, lambda first: range(first, 612), is_padded=False)


def test_rows_are_not_searched_where_the_tokenizer_fits(tokenizer):
    def fail(_):
        raise AssertionError

    check_vocabulary(Qwen3Config(vocab_size=600), tokenizer, fail, is_padded=True)
    check_vocabulary(Gemma3Config(text_config={"vocab_size": 600}), tokenizer, fail, is_padded=True)
    assert tokenizer_size(tokenizer) == 600


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_the_old(is_tied, dtype, caplog):
    caplog.set_level(logging.INFO)
    config = make_model(64, hidden_size=32, num_layers=1).config
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.5  # so that the mean is not about 0, as new rows are at first
        model.get_output_embeddings().weight += 0.25
    before = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    ids = torch.arange(20)[None]
    logits = model(ids).logits
    add_rows(model, 67)
    after = [m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (after[0] is after[1]) is is_tied
    for old, new in zip(before, after, strict=True):
        assert new.shape == (67, 32)
        assert new.dtype == dtype
        assert new.requires_grad
        torch.testing.assert_close(new[:64], old, rtol=0, atol=0)
        torch.testing.assert_close(new[64:], old.float().mean(0).to(dtype).expand(3, -1), rtol=0, atol=0)
    assert model.config.vocab_size == 67
    torch.testing.assert_close(model(ids).logits[..., :64], logits)
    assert "3 rows more, 67 in all: each is the mean of the 64 before" in caplog.text
    add_rows(model, 60)
    assert model.get_input_embeddings().weight.shape == (67, 32)


# ---- positions ----------------------------------------------------------------------------------

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TABLES = {
    "gpt2": GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2),
    "opt": OPTConfig(**SMALL, max_position_embeddings=32, ffn_dim=16, word_embed_proj_dim=16),
    "gptj": GPTJConfig(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
}
OPEN_ENDED = {
    "qwen3": Qwen3Config(**SMALL, intermediate_size=16, max_position_embeddings=32, head_dim=8, num_key_value_heads=2),
    "jamba": JambaConfig(**SMALL, max_position_embeddings=32),  # its attention knows no positions
    "xglm": XGLMConfig(vocab_size=64, d_model=16, num_layers=1, attention_heads=2, max_position_embeddings=32),
}
FORWARD = {**TABLES, "qwen3": OPEN_ENDED["qwen3"], "xglm": OPEN_ENDED["xglm"]}


@pytest.mark.parametrize("name", FORWARD)
def test_models_with_a_table_are_those_that_take_no_longer_row(name):
    """The rule, compared with the model itself."""
    config = FORWARD[name]
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model(torch.ones(1, 32, dtype=torch.long))
    if name in TABLES:
        assert has_position_table(config, 32)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.ones(1, 33, dtype=torch.long))
    else:
        assert not has_position_table(config, 32)
        assert model(torch.ones(1, 33, dtype=torch.long)).logits.shape == (1, 33, 64)


@pytest.mark.parametrize("name", TABLES)
def test_rows_beyond_a_table_of_positions_are_refused(name, caplog):
    check_positions(TABLES[name], 32, is_padded=False)
    check_positions(TABLES[name], 32, is_padded=True)
    with pytest.raises(UserError, match="longest row has 33 tokens and the model a table of 32 .*--max_length 32 "):
        check_positions(TABLES[name], 33, is_padded=False)
    assert caplog.text == ""


def test_padding_takes_positions_too():
    config = GPT2Config(vocab_size=64, n_positions=30, n_embd=16, n_layer=1, n_head=2)
    check_positions(config, 30, is_padded=False)
    check_positions(config, 24, is_padded=True)
    with pytest.raises(UserError, match="25 tokens, padded to 32, and the model a table of 30 .*--max_length 24 "):
        check_positions(config, 25, is_padded=True)


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_rows_beyond_what_a_model_was_made_for_are_warned_of(name, caplog):
    check_positions(OPEN_ENDED[name], 32, is_padded=True)
    assert caplog.text == ""
    check_positions(OPEN_ENDED[name], 33, is_padded=True)
    assert "WARNING" in caplog.text
    assert "longest row has 33 tokens, and the model was made for 32 positions" in caplog.text
    assert "--max_length 32" in caplog.text


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=32, rope_parameters=YARN), 128),  # the limit before it was extended
        (LlamaConfig(max_position_embeddings=128, rope_parameters=YARN), 128),
        (LlamaConfig(max_position_embeddings=160, rope_parameters=LLAMA3), 160),
        (LlamaConfig(max_position_embeddings=128, rope_parameters=LINEAR), 128),
        (
            Gemma3Config(
                text_config={
                    "max_position_embeddings": 100,
                    "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN},
                }
            ),
            100,
        ),
    ],
)
def test_scaled_rotations_reach_further(config, limit, caplog):
    check_positions(config, limit, is_padded=False)
    assert caplog.text == ""
    check_positions(config, limit + 1, is_padded=False)
    assert f"made for {limit} positions" in caplog.text


@pytest.mark.parametrize("config", [FalconMambaConfig(), PretrainedConfig()])
def test_a_model_without_a_limit_takes_rows_of_any_length(config, caplog):
    check_positions(config, 10**6, is_padded=True)
    assert caplog.text == ""


def test_documents_of_a_packed_row_count_by_themselves(tokenizer, tmp_path, caplog):
    """The longest row is looked at, of training and of evaluation, not the sum of what is packed."""
    tokenizer.chat_template = CHATML_TEMPLATE
    data = prepared(tokenizer, tmp_path, ["yes"] * 3, ["a b c d e f g h"])
    lengths = [len(ids) for ids in [*data.train["input_ids"], *data.evaluation["input_ids"]]]
    assert data.longest == max(lengths) == lengths[-1] > lengths[0]
    config = Qwen3Config(vocab_size=600, max_position_embeddings=data.longest)
    check_fit(data, config, tokenizer, is_padded=False, grows=False)
    assert caplog.text == ""
    config.max_position_embeddings -= 1
    check_fit(data, config, tokenizer, is_padded=False, grows=False)
    assert f"longest row has {data.longest} tokens" in caplog.text


def test_a_bias_of_the_output_grows_too_and_what_does_not_grow_is_refused(monkeypatch):
    config = GPTJConfig(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[GPTJConfig](config)
    bias = model.get_output_embeddings().bias
    with torch.no_grad():
        bias += torch.arange(64)
    add_rows(model, 66)
    assert model.get_output_embeddings().bias[64:].tolist() == [31.5, 31.5]
    monkeypatch.setattr(model, "resize_token_embeddings", lambda *_, **__: None)
    with pytest.raises(UserError, match="an embedding has 66 rows and not 70 afterwards; resize the model beforehand"):
        add_rows(model, 70)
