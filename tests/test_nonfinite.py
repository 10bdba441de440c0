"""A loss or a gradient that is NaN or infinite: the run ends before the update, or goes on without it."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DataCollatorForSeq2Seq
from transformers.training_args import OptimizerNames

from dft.config.training import DFTTrainingArguments
from dft.config.training_checks import check_skips
from dft.errors import UserError
from dft.loss.finite_check import FiniteCheck
from dft.nonfinite import MAX_OVERFLOWS, NonfiniteSteps
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.config.parsing import assert_refused
from tests.helpers import flat_weights, rows, spoil_gradient

ROWS_PER_STEP = 4


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    """Makes a trainer whose loss or gradient isn't finite in some steps, of two micro-batches each."""

    def make(bad_steps=(), kind: str = "gradient", data=None, **settings) -> DFTTrainer:
        args = DFTTrainingArguments(
            **{
                "output_dir": str(tmp_path),
                "use_cpu": True,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "train_sampling_strategy": "sequential",
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "weight_decay": 0.1,
                "logging_steps": 1,
                "max_steps": 4,
                "save_strategy": "no",
                "report_to": ["none"],
                "disable_tqdm": True,
                "activation_checkpointing": False,
                **settings,
            }
        )
        trainer = DFTTrainer(
            make_model(600, hidden_size=32, num_layers=2),
            args,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows(16) if data is None else data,
            source_of_row="chats.jsonl:{}".format,
        )

        def is_bad() -> bool:
            return trainer.state.global_step + 1 in bad_steps

        if kind == "gradient":
            spoil_gradient(trainer.model, is_bad)
        else:
            score = trainer.scorer.score

            def infinite(*args):
                loss_sum, *others = score(*args)
                return (loss_sum + math.inf if is_bad() else loss_sum, *others)

            trainer.scorer.score = infinite
        return trainer

    return make


def trained(trainer: DFTTrainer, **settings) -> torch.Tensor:
    trainer.train(**settings)
    return flat_weights(trainer.model)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_update(trainer_of, max_grad_norm, tmp_path):
    before = trained(trainer_of(max_steps=1, max_grad_norm=max_grad_norm))
    trainer = trainer_of([2], max_grad_norm=max_grad_norm, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"gradient is (nan|inf) in step 2\..*lower --learning_rate.*skip"):
        trainer.train()
    assert torch.equal(flat_weights(trainer.model), before)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_skipped_update_leaves_nothing_behind(trainer_of, caplog, kind, max_grad_norm):
    """Neither in the weights nor in the optimizer: the run is one that has not had the rows of the step."""
    others = rows(16).select([i for i in range(16) if i // ROWS_PER_STEP != 1])
    expected = trained(trainer_of(data=others, max_steps=3, max_grad_norm=max_grad_norm))
    trainer = trainer_of([2], kind, on_nonfinite="skip", max_grad_norm=max_grad_norm)
    with caplog.at_level(logging.WARNING, "dft.nonfinite"):
        assert torch.equal(trained(trainer), expected)
    (record,) = (record for record in caplog.records if record.name == "dft.nonfinite")
    assert f"the {kind}" in record.message or f"of the {kind}" in record.message
    assert "in step 2." in record.message
    if kind == "loss":
        assert "chats.jsonl:4, chats.jsonl:5, chats.jsonl:6, chats.jsonl:7." in record.message
    records = [record for record in trainer.state.log_history if "grad_norm" in record]
    assert [record["train/nonfinite_steps"] for record in records] == [0, 1, 0, 0]
    assert trainer.lr_scheduler.last_epoch == 3


def test_without_a_fault_nothing_is_said_of_it(trainer_of):
    trainer = trainer_of(max_steps=1)
    trainer.train()
    assert not any("train/nonfinite_steps" in record for record in trainer.state.log_history)


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_so_many_in_a_row_end_the_run(trainer_of, kind):
    trainer = trainer_of([1, 3, 4], kind, on_nonfinite="skip", max_nonfinite_steps=2)
    with pytest.raises(FloatingPointError, match=r"in 2 steps in a row, the last of them step 4\."):
        trainer.train()


def test_a_run_goes_on_bit_for_bit_after_a_skipped_step(trainer_of, tmp_path):
    settings = {"on_nonfinite": "skip", "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 1}
    expected = trained(trainer_of([2], **settings))
    trainer = trainer_of([2], **settings)
    resumed = trained(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed, expected)
    assert trainer.lr_scheduler.last_epoch == 3


def test_the_gradient_of_an_infinite_loss_is_not_finite_either():
    """It may be, as that of a sum with a constant; DeepSpeed looks at nothing else before its update."""
    check = FiniteCheck(None, nonfinite=NonfiniteSteps(skips=True))
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    weight = torch.ones(3, requires_grad=True)
    check.begin(2)
    check.note(weight.sum() + math.inf, inputs, 1).backward()
    assert torch.isfinite(weight.grad).all()
    check.note(weight.sum(), inputs, 1).backward()
    assert torch.isnan(weight.grad).all()


def test_overflows_of_scaled_losses_are_left_to_the_scaler_until_there_are_too_many():
    steps = NonfiniteSteps(scales_loss=True)
    for step in range(1, MAX_OVERFLOWS):
        assert not steps.end_step(step, math.inf)
    assert steps.take_record() == {"train/nonfinite_steps": MAX_OVERFLOWS - 1}
    steps.end_step(MAX_OVERFLOWS, 1.0)
    assert steps.take_record() == {}
    for step in range(1, MAX_OVERFLOWS):
        steps.end_step(step, math.nan)
    with pytest.raises(FloatingPointError, match=r"bfloat16"):
        steps.end_step(MAX_OVERFLOWS, math.nan)


def arguments(zero_stage: int | None, optim: str = "adamw_torch", **deepspeed: bool) -> SimpleNamespace:
    values = {name.replace("__", "."): value for name, value in deepspeed.items()}
    plugin = SimpleNamespace(zero_stage=zero_stage, hf_ds_config=SimpleNamespace(get_value=values.get))
    plugin = None if zero_stage is None else plugin
    return SimpleNamespace(on_nonfinite="skip", optim=OptimizerNames(optim), deepspeed_plugin=plugin)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0,), "not 0"),
        ((None, "galore_adamw_layerwise"), "--optim galore_adamw_layerwise"),
    ],
)
def test_updates_that_cannot_be_skipped_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        check_skips(arguments(*args))


@pytest.mark.parametrize("name", ["bf16__check_grad_overflow", "zero_optimization__compute_grad_norm"])
def test_so_are_settings_of_deepspeed_that_let_them_happen(name):
    check_skips(arguments(2, **{name: True}))
    with pytest.raises(UserError, match=name.replace("__", r"\.") + " false"):
        check_skips(arguments(2, **{name: False}))


def test_the_number_of_steps_in_a_row_has_a_range():
    assert_refused(["--max_nonfinite_steps", 0], "--max_nonfinite_steps is 0; it must be at least 1")
