"""Scores of reward models are those of one row after the other, and what isn't a reward model is refused."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

from data_utils import load_conversations
from dft.errors import UserError
from dft.selection.method import apply
from dft.selection.model_flags import ModelFlags
from dft.selection.model_rows import compute_rows
from dft.selection.quality import QualityConfig, quality
from dft.selection.reward_model import RewardModel, positions
from tests.helpers import CHATML_TEMPLATE

SIZES = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODER = Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
ENCODER = BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=512, initializer_range=0.3)
DISTANCES = {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "position_buckets": 32,
}
OPT_SIZES = {
    "vocab_size": 600, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
CASES = {  # a configuration, a template, labels, the label that is asked for
    "a decoder with a template": (DECODER, CHATML_TEMPLATE, ["score"], None),
    "an encoder of pairs": (ENCODER, None, ["score"], None),
    "a classifier": (ENCODER, None, ["bad", "good", "best"], "good"),
    "by number": (DECODER, None, ["bad", "good"], "1"),
}


@pytest.fixture
def conversations(chat_file):
    return list(load_conversations([str(chat_file)]))


@pytest.fixture
def make(tmp_path, tokenizer):
    """Writes a random classifier; returns how it is asked for."""

    def write(config, template, labels) -> ModelFlags:
        config = type(config)(**{**config.to_dict(), "id2label": dict(enumerate(labels))})
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        return ModelFlags(tmp_path / "model", device="cpu", tokens_at_once=400, cache_dir=tmp_path / "cache")

    return write


def row_by_row(conversations, directory, template, label: int | None) -> list[float]:
    """Scores of rows that share no batch, in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model.config.pad_token_id = tokenizer.pad_token_id
    scores = []
    for row in conversations:
        if template:
            text = tokenizer.apply_chat_template(row.messages, row.tools, tokenize=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            before = "\n\n".join(m["content"] for m in row.messages[:-1] if m["content"])
            inputs = tokenizer(before, row.messages[-1]["content"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        scores.append(float(logits[0] if label is None else logits.exp()[label] / logits.exp().sum()))
    return scores


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_row_after_the_other(conversations, make, case, tmp_path):
    config, template, labels, label = CASES[case]
    flags = make(config, template, labels)
    scores, refusals = RewardModel(flags, label).scores(conversations, None, flags.tokens_at_once, flags.cache_dir)
    expected = row_by_row(conversations, flags.directory, template, None if label is None else 1)
    assert not refusals
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 1e-2  # else any order of the rows would do
    assert not np.allclose(scores, np.roll(expected, 1), rtol=1e-2)


def test_rows_below_the_threshold_and_the_share_are_dropped(conversations, make):
    flags = make(ENCODER, None, ["score"])
    scores, _ = RewardModel(flags).scores(conversations, None, 400, flags.cache_dir)
    alpha = float(np.sort(scores)[30])
    kept, dropped = apply(conversations, quality(QualityConfig(flags, alpha=alpha)))
    assert [row.line for row in kept] == [row.line for row, s in zip(conversations, scores, strict=True) if s >= alpha]
    assert {row.reason for row in dropped} == {"low_quality"}
    kept, dropped = apply(conversations, quality(QualityConfig(flags, alpha=alpha, keep_share=0.05)))
    assert sorted(row.line for row in kept) == sorted((np.argsort(-scores)[:2] + 1).tolist())
    assert {row.reason for row in dropped} == {"low_quality", "below_share"}


def test_rows_that_are_too_long_are_dropped_with_a_reason(conversations, make):
    flags = make(ENCODER, None, ["score"])
    _, dropped = apply(conversations, quality(QualityConfig(flags, keep_share=1.0, max_length=40)))
    assert dropped
    assert all(row.reason == "too_long" for row in dropped)
    assert "more than the 40" in dropped[0].detail


def test_rows_that_are_longer_than_the_table_of_positions_are_dropped(conversations, make, tokenizer):
    """Whatever the tokenizer says of its longest row."""
    tokenizer.model_max_length = 10**30
    flags = make(BertConfig(**{**ENCODER.to_dict(), "max_position_embeddings": 40}), None, ["score"])
    scores, refusals = RewardModel(flags).scores(conversations, None, 400, None)
    assert 0 < len(refusals) < len(conversations)
    assert {error.reason for error in refusals.values()} == {"too_long"}
    assert set(np.flatnonzero(np.isnan(scores)).tolist()) == set(refusals)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DECODER, None),
        (ENCODER, 512),
        (RobertaConfig(**SIZES, num_attention_heads=4, max_position_embeddings=66, pad_token_id=1), 64),
        (OPTConfig(**OPT_SIZES, max_position_embeddings=64), 64),
        (DebertaV2Config(**SIZES, **DISTANCES, position_biased_input=False), None),
        (DebertaV2Config(**SIZES, **DISTANCES, position_biased_input=True), 64),
    ],
)
def test_the_room_of_a_table_is_what_the_model_takes(config, expected):
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert positions(model) == expected
    if expected is not None:
        model(torch.full((1, expected), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, expected + 1), 5))


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (["bad", "good"], None, "gives 2 scores and not one: choose a --label of bad, good"),
        (["bad", "good"], "fine", "--label fine is not one of .*: bad, good"),
        (["bad", "good"], "2", "--label 2 is not one of"),
        (["score"], "score", "has one score and no labels"),
    ],
)
def test_labels_must_fit_the_model(make, labels, label, message):
    with pytest.raises(UserError, match=message):
        RewardModel(make(ENCODER, None, labels), label)


def test_a_language_model_is_not_a_reward_model(tiny_model):
    with pytest.raises(UserError, match=r"not a reward model.*score\.weight"):
        RewardModel(ModelFlags(tiny_model, device="cpu"))


def test_scores_that_are_not_finite_name_the_row(conversations, make):
    flags = make(ENCODER, None, ["score"])
    model = RewardModel(flags)
    torch.nn.init.constant_(model.model.classifier.bias, float("nan"))
    with pytest.raises(UserError, match=r"aren't finite, the first for .*chats\.jsonl:1$"):
        model.scores(conversations, None, 400, flags.cache_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "give --alpha"), ({"keep_share": 1.5}, "--keep_share 1.5"), ({"alpha": float("nan")}, "--alpha nan")],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        QualityConfig(ModelFlags(tmp_path), **settings)


def test_a_cache_that_is_a_file_is_told_in_words_that_fit(tmp_path, caplog):
    (tmp_path / "cache").touch()
    found = compute_rows(np.array([3, 4]), lambda batch: np.ones(len(batch)), 100, tmp_path / "cache")
    assert found.tolist() == [1, 1]
    assert "are not kept in" in caplog.text
    assert "starting weights" not in caplog.text
