"""What a checkpoint was made with, and how a Trainer of a notebook tells and compares it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import DataCollatorForSeq2Seq

from dft.batching.plan import BatchPlan
from dft.checkpoints.facts import digest_of_rows, run_facts
from dft.config.loss import LossConfig
from dft.config.training import DFTTrainingArguments
from dft.errors import UserError
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.helpers import rows

SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def facts(tmp_path):
    """The facts of a run, called with what is other in it."""
    plan = BatchPlan("packed", max_length=64, max_tokens=None, rows_per_batch=2, batches_per_step=4, seed=1)

    def make(loss=None, model=None, data=None, flags=None, **changes) -> dict:
        args = DFTTrainingArguments(output_dir=str(tmp_path), report_to=["none"], **(flags or {}))
        config = (model or make_model(600, hidden_size=32, num_layers=2)).config
        return run_facts(args, loss or LossConfig(), config, data or rows(16), replace(plan, **changes))

    return make


def test_checkpoints_of_fsdp_are_told_apart(monkeypatch, facts):
    monkeypatch.setattr("dft.config.training.rank_and_world_size", lambda: (0, 2))
    sharded = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    assert [facts(flags=args)["fsdp"] for args in ({}, {"fsdp": True}, sharded)] == [
        *(None, "FULL_STATE_DICT"),
        "SHARDED_STATE_DICT",
    ]


def differences(then: dict, now: dict) -> set[str]:
    assert then.keys() == now.keys()
    return {name for name in then if then[name] != now[name]}


def test_what_decides_the_steps_is_told_apart(facts):
    base = facts()
    assert json.loads(json.dumps(base)) == base
    for changed, names in (
        (facts(data=rows(15)), {"training_rows", "content_of_rows"}),
        (facts(data=rows(16, seed=1)), {"content_of_rows"}),
        (facts(batching="padding_free"), {"batching"}),
        (facts(max_length=128), {"max_length"}),
        (facts(max_tokens=100), {"max_tokens_per_batch"}),
        (facts(rows_per_batch=4), {"rows_per_step"}),
        (facts(batches_per_step=2), {"rows_per_step"}),
        (facts(strategy="sequential"), {"sampling_strategy"}),
        (facts(seed=2), {"data_seed"}),
        (facts(loss=LossConfig(dft_alpha=0.5)), {"dft_alpha"}),
        (facts(loss=LossConfig(use_simple_dft=False)), {"dft_alpha", "use_simple_dft"}),
        (facts(loss=LossConfig(dft_gamma=2.0, loss_normalization="turn")), {"dft_gamma", "loss_normalization"}),
        (facts(flags={"learning_rate": 0.1, "warmup_steps": 2}), {"learning_rate", "warmup_steps"}),
        (facts(flags={"lr_scheduler_type": "cosine", "weight_decay": 0.1}), {"lr_scheduler_type", "weight_decay"}),
        (facts(flags={"max_steps": 7, "num_train_epochs": 9}), {"max_steps", "num_train_epochs"}),
        (facts(flags={"seed": 5}), {"seed"}),
        (facts(model=make_model(600, hidden_size=64, num_layers=2)), {"hidden_size", "intermediate_size", "head_dim"}),
        (facts(model=make_model(600, hidden_size=32, num_layers=3)), {"num_hidden_layers"}),
        (facts(model=make_model(608, hidden_size=32, num_layers=2)), {"vocab_size"}),
    ):
        assert names >= differences(base, changed) > set(), names
        assert differences(base, changed) >= names - {"intermediate_size", "head_dim"}


def test_what_makes_the_same_steps_is_the_same(facts):
    same = [
        facts(rows_per_batch=4, batches_per_step=2),
        facts(rows_per_batch=1, batches_per_step=8),
        facts(loss=LossConfig(fused_loss="off", loss_chunk_mb=1.0)),
        facts(flags={"logging_steps": 3, "save_steps": 7, "eval_steps": 5, "per_device_eval_batch_size": 2}),
    ]
    assert [differences(facts(), other) for other in same] == [set()] * 4


def test_the_digest_is_of_all_tokens_labels_and_weights_in_their_order():
    data = rows(1500)
    first = data[0]

    def with_row(index: int, **changed: list) -> Dataset:
        return Dataset.from_list([row | changed if i == index else row for i, row in enumerate(data)])

    labels = [*first["labels"][:-1], 7]
    weighted = data.add_column("loss_weights", [[1.0] * len(ids) for ids in data["input_ids"]])
    others = [
        with_row(0, labels=labels),
        with_row(1499, input_ids=[9] * len(data[1499]["input_ids"])),
        data.select(range(1499, -1, -1)),
        data.select(range(1499)),
        # the same tokens, divided into rows in another way
        Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]),
        Dataset.from_list([{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [2, 3]}]),
        weighted,
    ]
    digests = [digest_of_rows(data), *map(digest_of_rows, others)]
    assert len(set(digests)) == len(digests)
    assert digest_of_rows(data.select(range(1500))) == digests[0]
    assert digest_of_rows(data.add_column("channel", [0] * 1500)) == digests[0]


# ---- from Python --------------------------------------------------------------------------------


def made_with(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "manifest.json").read_text())["made_with"]


def test_a_trainer_of_a_notebook_writes_and_compares_too(make_trainer, tmp_path, caplog):
    make_trainer(**SAVES, max_steps=2).train()
    for step in (1, 2):
        found = made_with(tmp_path / f"checkpoint-{step}")
        assert (found["training_rows"], found["rows_per_step"], found["dft_alpha"]) == (16, 8, 1.0)
    checkpoint = str(tmp_path / "checkpoint-2")
    longer = make_trainer(**SAVES, max_steps=3)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3
    assert "was made with other data" not in caplog.text
    other = make_trainer(**SAVES, max_steps=3, dft_alpha=0.5, train_dataset=rows(24))
    other.train(resume_from_checkpoint=checkpoint)  # plain TrainingArguments have no way to say "all the same"
    assert other.state.global_step == 3
    for line in ("training_rows: checkpoint 16, now 24", "dft_alpha: checkpoint 1.0, now 0.5"):
        assert line in caplog.text


def test_differences_are_refused_before_anything_is_trained(make_trainer, tokenizer, tmp_path):
    make_trainer(**SAVES, max_steps=1).train()
    for goes_on in (False, True):
        args = DFTTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, resume_anyway=goes_on
        )
        trainer = DFTTrainer(
            make_model(600, hidden_size=32, num_layers=2),
            args,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows(16),
        )
        if goes_on:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        else:
            with pytest.raises(UserError, match="rows_per_step: checkpoint 8, now 4"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert trainer.state.global_step == (2 if goes_on else 0)


def test_rows_without_columns_are_trained_on_all_the_same(make_trainer, tmp_path):
    class Rows(TorchDataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return rows(16)[index]

    make_trainer(**SAVES, max_steps=1, train_dataset=Rows()).train()
    assert "training_rows" not in made_with(tmp_path / "checkpoint-1")
    assert made_with(tmp_path / "checkpoint-1")["rows_per_step"] == 8
    trainer = make_trainer(**SAVES, max_steps=2, train_dataset=rows(16).to_iterable_dataset())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_facts_that_are_given_are_written_as_they_are(make_trainer, tmp_path):
    make_trainer(**SAVES, max_steps=1, made_with={"training_rows": 5}).train()
    assert made_with(tmp_path / "checkpoint-1") == {"training_rows": 5}
