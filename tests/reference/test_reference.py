"""Log-probabilities by the starting weights: beside the right labels, found again, and never of other weights."""

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.packing import PackedRows, best_fit_decreasing
from dft.batching.sampler import token_lengths
from dft.batching.varlen_attention import register
from dft.constants import REFERENCE_COLUMN
from dft.errors import UserError
from dft.reference import store
from dft.reference.rows import CollatorWithColumn, ReferenceRows, is_supervised, with_reference
from dft.reference.scoring import plan_scoring, row_lengths, score_rows
from dft.reference.trainer import ReferenceTrainer
from examples.make_tiny_model import make_model
from tests.helpers import rows

CACHE = "of other runs"


@pytest.fixture
def make_anchored(make_trainer, tmp_path):
    """A trainer of the objective anchored, strongly, with a cache of its own."""

    def make(model=None, **settings):
        defaults = {"objective": "anchored", "objective_args": {"strength": 0.5}, "learning_rate": 1e-2}
        return make_trainer(model, reference_cache_dir=str(tmp_path / CACHE), **(defaults | settings))

    return make


def log_p_of(model: torch.nn.Module, row: dict) -> np.ndarray:
    """log p of each supervised token of a row, alone, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    found = torch.log_softmax(logits, -1)[range(len(logits) - 1), row["input_ids"][1:]]
    return found.numpy()[is_supervised(row["labels"])[1:]]


# ---- the column ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_every_token_gets_its_own_log_probability(make_anchored, tokenizer, batching):
    model = make_model(600, hidden_size=32, num_layers=2)
    before = copy.deepcopy(model)
    data = rows(16)
    if batching != "padded":
        register()
        model.set_attn_implementation("varlen")
    if batching == "packed":
        data = PackedRows(data, best_fit_decreasing(token_lengths(data), 96))
    trainer = make_anchored(model, train_dataset=data, per_device_train_batch_size=2)
    trainer.data_collator.collator = PaddingCollator(tokenizer) if batching == "padded" else FlatteningCollator()
    trainer.train()
    filled = trainer.train_dataset.rows if batching == "packed" else trainer.train_dataset
    for dataset in (filled, trainer.eval_dataset):
        for row in (dataset[i] for i in range(len(dataset))):
            supervised = is_supervised(row["labels"])
            assert row[REFERENCE_COLUMN][supervised] == pytest.approx(log_p_of(before, row), rel=1e-4, abs=1e-5)
            assert not row[REFERENCE_COLUMN][~supervised].any()
    moved = log_p_of(model, filled[0])
    assert moved != pytest.approx(filled[0][REFERENCE_COLUMN][is_supervised(filled[0]["labels"])], rel=1e-2)


COLLATORS = {
    "padded on the right": lambda tokenizer: DataCollatorForSeq2Seq(tokenizer),
    "padded on the left": lambda tokenizer: DataCollatorForSeq2Seq(left(tokenizer)),
    "ours": PaddingCollator,
    "without padding": lambda _: FlatteningCollator(),
    "without padding, transformers'": lambda _: DataCollatorWithFlattening(),
}


def left(tokenizer):
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.mark.parametrize("name", COLLATORS)
def test_collators_of_every_kind_put_the_column_beside_the_labels(tokenizer, name):
    """A value is that of the token it stands beside: here the token divided by 1000. Fillers and packed rows too."""
    data = [dict(row) for row in rows(7)] + [{"input_ids": [5, 6], "labels": [-100, -100]}]
    for row in data:
        row[REFERENCE_COLUMN] = np.where(is_supervised(row["labels"]), np.array(row["input_ids"]) / 1000, 0.0)
    collate = CollatorWithColumn(COLLATORS[name](tokenizer))
    batch = collate([{"documents": data[:3]}, *data[3:]])
    supervised = batch["labels"] != -100
    assert supervised.sum() == sum(is_supervised(row["labels"]).sum() for row in data)
    torch.testing.assert_close(batch[REFERENCE_COLUMN][supervised], batch["labels"][supervised] / 1000)
    assert not batch[REFERENCE_COLUMN][~supervised].any()
    with pytest.raises(ValueError, match="1 of 8 rows lack the column"):
        collate([*data[:-1], {name: value for name, value in data[-1].items() if name != REFERENCE_COLUMN}])


def test_a_batch_without_the_column_is_the_collators_own(tokenizer):
    collate = DataCollatorForSeq2Seq(tokenizer)
    data = [rows(3)[i] for i in range(3)]
    assert REFERENCE_COLUMN not in CollatorWithColumn(collate)(data)
    assert torch.equal(CollatorWithColumn(collate)(data)["labels"], collate(data)["labels"])


def test_the_first_token_of_a_row_has_no_value():
    assert is_supervised([5, -100, 6]).tolist() == [False, False, True]
    assert is_supervised([]).tolist() == []


def test_values_of_other_rows_are_refused():
    data = ReferenceRows(rows(3))
    with pytest.raises(ValueError, match="4 values of 2 rows are given for 3 rows"):
        data.fill(np.zeros(4, np.float32), np.array([2, 2]))


def test_rows_that_come_with_the_column_keep_it(make_anchored):
    """Of any other model."""
    data = rows(16)
    data = data.add_column(REFERENCE_COLUMN, [[-1.5] * len(ids) for ids in data["input_ids"]])
    trainer = make_anchored(train_dataset=data)
    trainer.train()
    assert trainer.train_dataset is data
    assert isinstance(trainer.eval_dataset, ReferenceRows)
    assert len(list(Path(trainer.args.output_dir, store.RUN_DIRECTORY).iterdir())) == 1  # of the evaluation rows


def test_a_dataset_without_a_length_is_refused(make_anchored):
    with pytest.raises(ValueError, match="dataset without a length"):
        make_anchored(train_dataset=rows(4).to_iterable_dataset())


def test_sets_of_evaluation_rows_have_names():
    sets = with_reference({"a": rows(2), "b": rows(3)})
    assert {name: len(data) for name, data in sets.items()} == {"a": 2, "b": 3}
    assert with_reference(None) is None


# ---- scoring ------------------------------------------------------------------------------------


def test_rows_are_scored_once_in_batches_of_similar_length():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = plan_scoring(lengths, 120)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= 120
    assert len(batches) < 1.2 * lengths.sum() / 120 + 1
    assert plan_scoring(np.array([500, 3]), 120) == [[0], [1]]
    assert plan_scoring(np.zeros(0, int), 120) == []


def test_scores_come_in_the_order_of_the_rows():
    data = [{"input_ids": [i] * 5, "labels": [-100, *([i] * (1 + i % 4)), *([-100] * (3 - i % 4))]} for i in range(9)]

    def score(items):
        return torch.cat(
            [torch.full((int(is_supervised(row["labels"]).sum()),), row["input_ids"][0]) for row in items]
        )

    values, counts = score_rows(data, plan_scoring(row_lengths(data), 15), score)
    assert values.tolist() == [i for i in range(9) for _ in range(1 + i % 4)]
    assert counts.tolist() == [1 + i % 4 for i in range(9)]


def test_lengths_are_those_of_the_rows_whatever_holds_them():
    data = rows(7)
    assert row_lengths(data).tolist() == token_lengths(data).tolist()
    some = data.select([5, 2, 3])
    assert row_lengths(some).tolist() == token_lengths(some).tolist() == row_lengths(list(some)).tolist()


# ---- files --------------------------------------------------------------------------------------


def trained(make, capsys_or_caplog, **settings):
    capsys_or_caplog.clear()
    trainer = make(**settings)
    trainer.train()
    return trainer, capsys_or_caplog.text


def test_another_run_of_the_same_model_and_data_finds_the_file(make_anchored, tmp_path, caplog):
    caplog.set_level("INFO")
    first, said = trained(make_anchored, caplog)
    assert said.count("log-probabilities by the starting weights, ") == 2  # training and evaluation rows
    for name in os.listdir(tmp_path / store.RUN_DIRECTORY):
        (tmp_path / store.RUN_DIRECTORY / name).unlink()
    second, said = trained(make_anchored, caplog)
    assert said.count("log-probabilities by the starting weights from ") == 2
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    _, said = trained(make_anchored, caplog, train_dataset=rows(15))
    assert said.count("log-probabilities by the starting weights from ") == 1  # of the evaluation rows


def test_values_of_other_weights_are_computed_again(make_anchored, caplog):
    """The model has the same name and configuration."""
    caplog.set_level("INFO")
    trained(make_anchored, caplog)
    other = make_model(600, hidden_size=32, num_layers=2)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.3)
    before = copy.deepcopy(other)
    trainer, said = trained(make_anchored, caplog, model=other)
    assert said.count("are of other weights; computed again") == 2
    row = trainer.train_dataset[0]
    assert row[REFERENCE_COLUMN][is_supervised(row["labels"])] == pytest.approx(
        log_p_of(before, row), rel=1e-4, abs=1e-5
    )


def test_a_damaged_file_is_computed_again(make_anchored, tmp_path, caplog):
    trained(make_anchored, caplog)
    for directory in (store.RUN_DIRECTORY, CACHE):
        for path in (tmp_path / directory).iterdir():
            path.write_bytes(path.read_bytes()[:-100])
    trainer, said = trained(make_anchored, caplog)
    assert "can't be read" in said
    assert trainer.train_dataset.is_filled


def test_a_directory_that_cannot_be_written_to_is_said(make_trainer, tmp_path, caplog):
    (tmp_path / "file").touch()
    trainer = make_trainer(objective="prior", reference_cache_dir=str(tmp_path / "file" / "cache"))
    trainer.train()
    assert "are not kept in" in caplog.text
    assert len(os.listdir(tmp_path / store.RUN_DIRECTORY)) == 2


def test_files_are_named_after_rows_labels_and_model(tmp_path):
    model, data = make_model(600, hidden_size=32, num_layers=2), rows(5)
    relabeled = Dataset.from_list([row | {"labels": [-100, *row["labels"][1:-1], -100]} for row in data])
    wider = make_model(600, hidden_size=64, num_layers=2)
    names = [store.file_name(data, model), store.file_name(relabeled, model), store.file_name(data, wider)]
    names += [store.file_name(list(data), model), store.file_name(list(relabeled), model)]
    assert len(set(names)) == 5
    assert names[0] == store.file_name(rows(5), model)
    saved = make_model(600, hidden_size=32, num_layers=2)
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    name = store.file_name(data, loaded)
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert store.file_name(data, loaded) != name


# ---- trainings ----------------------------------------------------------------------------------


def resumed(make_anchored, tmp_path, lose: tuple[str, ...] = ()):
    """The same training in one go, and resumed after its first step, when the files in these directories are gone."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    whole = make_anchored(**settings)
    whole.train()
    for directory in lose:
        for path in (tmp_path / directory).iterdir():
            path.unlink()
    again = make_anchored(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    return whole.model, again.model


@pytest.mark.parametrize("lose", [(), (CACHE,), (store.RUN_DIRECTORY,), (CACHE, store.RUN_DIRECTORY)])
def test_a_resumed_training_is_held_by_the_same_weights(make_anchored, tmp_path, lose):
    whole, again = resumed(make_anchored, tmp_path, lose)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sharded_weights_cannot_be_asked_again(make_anchored, tmp_path, monkeypatch):
    monkeypatch.setattr("dft.reference.trainer.ReferenceTrainer._is_sharded", lambda self: True)
    with pytest.raises(UserError, match="those of the training rows and the evaluation rows are in none of"):
        resumed(make_anchored, tmp_path, (CACHE, store.RUN_DIRECTORY))


def test_held_by_the_resumed_weights_it_would_be_another_training(make_anchored, tmp_path, monkeypatch):
    """The mutant that asks the weights of the checkpoint."""
    monkeypatch.setattr(
        ReferenceTrainer, "train", lambda self, *args, **kw: super(ReferenceTrainer, self).train(*args, **kw)
    )
    whole, again = resumed(make_anchored, tmp_path, (CACHE, store.RUN_DIRECTORY))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_evaluated_without_a_training_the_model_is_its_own_reference(make_anchored, make_trainer):
    """So an anchored weight is p, as for DFT."""
    found, expected = make_anchored().evaluate(), make_trainer().evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["eval_ratio_clipped"] == 0.0
    assert "eval_ratio_clipped" not in expected


def test_rows_that_the_trainer_does_not_know_cannot_be_evaluated(make_anchored):
    trainer = make_anchored()
    with pytest.raises(ValueError, match="rows have no column reference_log_p"):
        trainer.evaluate(rows(3))


def test_a_training_is_held(make_anchored, make_trainer):
    """It stays nearer to the weights that it began with than DFT does, in log p of what it is trained on."""

    def distance(trainer) -> float:
        before = copy.deepcopy(trainer.model)
        trainer.train()
        data = rows(16)
        moved = [log_p_of(trainer.model, data[i]) - log_p_of(before, data[i]) for i in range(16)]
        return float(np.abs(np.concatenate(moved)).mean())

    settings = {"max_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    held = distance(make_anchored(objective_args={"strength": 10.0}, **settings))
    free = distance(make_trainer(**settings))
    assert held < 0.8 * free


def test_clipped_ratios_are_counted_and_warned_of(make_anchored, caplog):
    data = rows(16)
    data = data.add_column(REFERENCE_COLUMN, [[math.log(0.9)] * len(ids) for ids in data["input_ids"]])  # it knew them
    trainer = make_anchored(train_dataset=data)
    trainer.train()
    record = next(r for r in trainer.state.log_history if "ratio_clipped" in r)
    assert record["ratio_clipped"] > 0.5
    assert caplog.text.count("of the ratios of p to that of the starting weights are clipped") == 1
    assert "raise strength or max_ratio" in caplog.text
