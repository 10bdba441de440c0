"""Trainings in stages: resumed, with their learning rates, records and evaluations."""

import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from dft.batching.plan import BatchPlan
from dft.batching.stages import plan_stages
from dft.checkpoints.compare import compare_facts
from dft.checkpoints.facts import run_facts
from dft.config.stages import Stage
from dft.errors import UserError
from dft.staged import check_stages_can_run, multiply_rate, warn_of_early_end
from tests.helpers import flat_weights, rows

DATA = rows(48)
LENGTHS = np.array([len(ids) for ids in DATA["input_ids"]])
BATCHES = BatchPlan("padded", 64, None, rows_per_batch=2, batches_per_step=2, seed=5)


def stages_of(batches: BatchPlan = BATCHES, factors=(1.0, 0.5, 2.0), num_steps: int = 9):
    """Three stages: of the first rows, of the others, and of both."""
    first, second = np.arange(20), np.arange(20, 48)
    sources = [{"a": (first, 1.0)}, {"b": (second, 1.0)}, {"a": (first, 0.5), "b": (second, 1.0)}]
    stages = [
        Stage(f"stage {i}", {}, False, 1 / 3, None, None, factor, "stages.yaml:1") for i, factor in enumerate(factors)
    ]
    return plan_stages(stages, sources, LENGTHS, batches, num_steps)


@pytest.fixture
def staged(make_trainer, tokenizer):
    """A trainer of nine steps of the stages, three of each; with the rows that its batches are made of."""

    def make(batches: BatchPlan = BATCHES, plan=None, **settings):
        plan = plan or stages_of(batches)
        trainer = make_trainer(
            **{
                "per_device_train_batch_size": batches.rows_per_batch,
                "gradient_accumulation_steps": batches.batches_per_step,
                "max_steps": 9,
                "learning_rate": 1e-2,
                "train_dataset": plan.training_rows(DATA),
                "stages": plan,
                **settings,
            }
        )
        collate, trainer.seen = batches.collator(tokenizer), []
        trainer.data_collator = lambda some: trainer.seen.append(copy.deepcopy(some)) or collate(some)
        return trainer

    return make


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_resumed_in_a_stage_equals_uninterrupted_bit_for_bit(staged, tmp_path, batching):
    batches = replace(BATCHES, batching=batching, strategy=None)
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = staged(batches, **settings)
    whole.train()
    assert len(whole.seen) == 18
    for step in (5, 6):  # in the second stage, and at its end
        resumed = staged(batches, output_dir=str(tmp_path / f"on from {step}"), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.seen == whole.seen[2 * step :]
        assert torch.equal(flat_weights(resumed.model), flat_weights(whole.model))
        records = [[r["learning_rate"] for r in t.state.log_history if "learning_rate" in r] for t in (resumed, whole)]
        assert records[0] == records[1]


def test_each_step_has_the_rate_of_the_schedule_times_the_factor_of_its_stage(staged):
    trainer = staged(lr_scheduler_type="linear", optim="sgd")
    used = []
    step = torch.optim.SGD.step

    def note(optimizer, *args, **kwargs):
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", note)
        trainer.train()
    plain = np.array([1e-2 * (9 - i) / 9 for i in range(9)])
    expected = plain * np.repeat([1.0, 0.5, 2.0], 3)
    assert used == pytest.approx(expected)
    assert used != pytest.approx(plain)
    records = [r for r in trainer.state.log_history if "train/stage" in r]
    assert [r["train/stage"] for r in records] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_first_step_has_its_factor_too():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 10)
    multiply_rate(schedule, lambda step: 4.0 if step == 0 else 1.0)
    assert (optimizer.param_groups[0]["lr"], schedule.get_last_lr()) == (2.0, [2.0])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.45)
    assert json.dumps(schedule.state_dict())  # nothing of the stages, which a checkpoint would hold on to


def test_stages_are_named_at_their_start_and_recorded_and_evaluated_at_their_end(staged, caplog):
    caplog.set_level("INFO")
    trainer = staged(logging_steps=100, eval_strategy="steps", eval_steps=100)
    trainer.train()
    said = [record.message for record in caplog.records if record.message.startswith("Stage")]
    assert said == [f"Stage {i + 1} of 3, stage {i}: steps {3 * i + 1} to {3 * i + 3}" for i in range(3)]
    history = trainer.state.log_history
    assert [(r["step"], r["train/stage"]) for r in history if "train/stage" in r] == [(3, 1), (6, 2), (9, 3)]
    assert [r["step"] for r in history if "eval_loss" in r] == [3, 6, 9]
    by_epoch = staged(eval_strategy="epoch")
    by_epoch.train()
    assert [r["step"] for r in by_epoch.state.log_history if "eval_loss" in r] == [3, 6, 9]
    delayed = [({"eval_strategy": "epoch"}, 0.5, [6, 9]), ({"eval_strategy": "epoch"}, 1, [9])]
    delayed += [({"eval_strategy": "steps", "eval_steps": 100}, 4, [6, 9])]
    for settings, delay, steps in delayed:
        late = staged(eval_delay=delay, **settings)
        late.train()
        assert [r["step"] for r in late.state.log_history if "eval_loss" in r] == steps
    never = staged()
    never.train()
    assert not any("eval_loss" in r for r in never.state.log_history)


def test_a_training_may_end_within_the_plan_and_goes_on_in_no_other(staged, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    short = staged(max_steps=5, **settings)
    short.train()
    assert [r["train/stage"] for r in short.state.log_history if "train/stage" in r] == [1, 1, 1, 2, 2]
    made_with = json.loads((tmp_path / "checkpoint-4" / "manifest.json").read_text())["made_with"]
    assert [stage["steps"] for stage in made_with["stages"]] == [3, 3, 3]
    of_run = partial(run_facts, short.args, short.loss_config, short.model.config, DATA)
    compare_facts(tmp_path / "checkpoint-4", of_run(stages=stages_of()), go_on=False)
    for other in (None, stages_of(num_steps=12), stages_of(factors=(1.0, 0.5, 1.0))):
        with pytest.raises(UserError, match=r"other data or settings than this run:\n  stages: checkpoint "):
            compare_facts(tmp_path / "checkpoint-4", of_run(stages=other), go_on=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": -1, "num_train_epochs": 1}, "set max_steps to the 9 steps"),
        ({"gradient_accumulation_steps": 1}, "the stages are planned for 4 rows a step, not 2"),
        ({"train_dataset": DATA.select(range(10))}, "the stages are planned for more than these 10 rows"),
    ],
)
def test_another_training_than_the_planned_one_is_refused(staged, settings, message):
    with pytest.raises(ValueError, match=message):
        staged(**settings).train()


def test_an_end_that_is_not_the_plans_is_said_or_refused(staged, caplog):
    with pytest.raises(UserError, match="--max_steps is 10, and the stages have 9 steps: lower it"):
        staged(max_steps=10)
    warn_of_early_end(stages_of(), 5)
    assert "The training ends after 5 of the 9 steps of its stages, without the stages stage 2" in caplog.text
    caplog.clear()
    warn_of_early_end(stages_of(), 9)
    assert "The training ends" not in caplog.text


def test_factors_need_a_schedule_that_is_a_function_of_the_step(staged):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(UserError, match="can't multiply the learning rates of --lr_scheduler_type reduce_lr_on_pl"):
        staged(**plateau)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(ValueError, match="or a scheduler of your own"):
        staged(optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)))
    trainer = staged()
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.trainer.get_scheduler", lambda *args, **kwargs: other)
        with pytest.raises(UserError, match="can't multiply the learning rates of a CosineAnnealingLR"):
            trainer.create_scheduler(9, optimizer)
    args = copy.copy(trainer.args)
    args.deepspeed_plugin = type("Plugin", (), {"hf_ds_config": type("File", (), {"config": {"scheduler": {}}})})
    with pytest.raises(UserError, match="the scheduler in --deepspeed"):
        check_stages_can_run(trainer.stages, args, 9)
    check_stages_can_run(stages_of(factors=(1.0, 1.0, 1.0)), args, 9)
