"""Sources of rows: their names, which of them have metrics, and the way from a file to a metric."""

import json

import numpy as np
import pytest
import torch

from data_utils import prepare_data
from dft.batching.collators import FlatteningCollator, PaddingCollator, token_channels
from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.data.channels import MAX_CHANNELS, choose_channels, file_names
from dft.errors import UserError
from tests.helpers import rows, write_jsonl
from tests.metrics.recomputation import recomputed


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/math.jsonl", "data/code.json"], ["math", "code"]),
        (["a/train.jsonl.gz", "b/train.jsonl.zst"], ["a/train", "b/train"]),
        (["x/a/train.json", "y/a/train.json", "other.parquet"], ["x/a/train", "y/a/train", "other"]),
        (["/train.json", "some/train.json"], ["train", "some/train"]),
        (["a.json", "a.jsonl", "b/a.json"], ["a.json", "a.jsonl", "a"]),
        (["a.jsonl", "a.jsonl.gz"], ["a.jsonl", "a.jsonl.gz"]),
        (["new\nline.json"], ["new_line"]),
        (["v1.2.jsonl"], ["v1.2"]),
    ],
)
def test_files_have_short_names_that_tell_them_apart(paths, names):
    assert file_names(paths) == names


PATHS = ["math.jsonl", "code.jsonl"]
OF_FILE = np.array([0, 0, 1, 1])
FIELDS = (np.array([0, 1, 2, 0]), ["", "web", "math"])  # of the four rows: none, web, math, none
NO_FIELDS = (np.zeros(4, dtype=np.int64), [""])


def chosen(wanted, of_field, field_names, of_file=OF_FILE, paths=PATHS):
    names, index = choose_channels(wanted, of_file, paths, of_field, field_names)
    assert index.dtype == np.int32
    return [names[i] for i in index] if names else []


def test_which_sources_are_told_apart():
    by_file, by_field = ["math", "math", "code", "code"], ["math", "web", "math", "code"]
    assert chosen("file", *NO_FIELDS) == chosen("auto", *NO_FIELDS) == chosen("file", *FIELDS) == by_file
    assert chosen("auto", *FIELDS) == chosen("field", *FIELDS) == by_field
    assert chosen("none", *FIELDS) == []
    with pytest.raises(UserError, match="no row has a field 'channel'"):
        chosen("field", *NO_FIELDS)


def test_one_source_and_very_many_have_no_metrics_unless_they_are_asked_for(caplog):
    one = (np.zeros(3, dtype=np.int64), [""], np.zeros(3, dtype=np.int64), ["a.jsonl"])
    assert chosen("auto", *one) == []
    assert chosen("file", *one) == ["a"] * 3
    count = MAX_CHANNELS + 1
    many = (np.arange(count), [f"site{i:02}" for i in range(count)], np.arange(count) % 2, PATHS)
    with caplog.at_level("INFO"):
        assert set(chosen("auto", *many)) == {"math", "code"}
    assert f"{count} channels: --channels field" in caplog.text
    assert len(set(chosen("field", *many))) == count


def test_from_files_to_rows(tmp_path, tokenizer):
    """Names are kept for training and held-out rows; fields that hold something else are no names."""
    conversation = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    fields = ["web ", {"id": 3}, None, "x" * 65, "two\nlines", 7, "web", "\u202e"]
    texts = [json.dumps({"messages": conversation, "channel": field}) for field in fields]
    (tmp_path / "mixed.jsonl").write_text("\n".join(texts) + "\n")
    write_jsonl(tmp_path / "plain.jsonl", [{"messages": conversation}] * 3)

    def prepared(**settings):
        files = [str(tmp_path / name) for name in ("mixed.jsonl", "plain.jsonl")]
        config = DataConfig(files, [files[1]], data_cache_dir=str(tmp_path / "cache"), **settings)
        return prepare_data(config, ChatFormat(tokenizer), progress=False)

    data = prepared()
    assert data.channels == ["mixed", "plain", "web"]
    names = ["web", *["mixed"] * 5, "web", "mixed", *["plain"] * 3]
    assert [data.channels[i] for i in data.train["channel"]] == names
    assert [data.channels[i] for i in data.evaluation["channel"]] == ["plain"] * 3
    data = prepared(channels="file")  # from the same cache
    assert data.channels == ["mixed", "plain"]
    assert "channel" not in prepared(channels="none").train.column_names


@pytest.mark.parametrize("packed", [True, False])
def test_every_position_has_the_channel_of_its_document(tokenizer, packed):
    items = [{"input_ids": [5] * n, "labels": [5] * n, "channel": channel} for n, channel in ((3, 1), (4, 0), (1, 2))]
    collator = FlatteningCollator() if packed else PaddingCollator(tokenizer)
    batch = collator([{"documents": items[:2]}, items[2]])
    found = token_channels(batch["channel"], batch["labels"], batch)
    assert found.shape == batch["labels"].shape
    is_token = torch.ones_like(found, dtype=torch.bool) if packed else batch["attention_mask"].bool()
    assert found[is_token].tolist() == [1] * 3 + [0] * 4 + [2]


def test_a_column_of_another_meaning_is_left_alone(make_trainer):
    """Without names of channels a column `channel` is one of those that Trainer drops."""
    trainer = make_trainer()
    data = rows(11, seed=1).add_column("channel", ["some text"] * 11)
    assert "eval_ce_loss" in trainer.evaluate(data)


def test_a_notebook_has_metrics_of_each_source(make_trainer):
    """Plain rows, a plain collator, a column of numbers."""
    trainer = make_trainer(dft_alpha=0.6, channels=["first", "second", "none of these"])
    data = rows(11, seed=1).add_column("channel", [i % 2 for i in range(11)])
    metrics = trainer.evaluate(data)
    expected = recomputed(trainer.model, data, 0.6, ("first", "second"))
    found = {key.removeprefix("eval_"): value for key, value in metrics.items() if "channel/" in key}
    assert len(found) == 6
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-5, abs=0), key
    for key in ("mean_weight", "p_below_0.01", "p_above_0.99"):
        assert metrics[f"eval_{key}"] == pytest.approx(expected[key], rel=1e-5), key
    assert "eval_entropy" not in metrics
