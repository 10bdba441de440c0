"""The best checkpoint and the newest stay, whatever is deleted; which evaluations can find the best."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dft.checkpoints.integrity import check_whole
from dft_trainer import DFTTrainer

STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "metric_for_best_model": "eval_acc"}
STEPS |= {"greater_is_better": True, "save_only_model": True, "per_device_train_batch_size": 1}


def with_results(trainer: DFTTrainer, accuracy: dict[int, float], **more: dict[int, float]) -> DFTTrainer:
    """The trainer, whose evaluations are said to have these results, {step: value}."""

    def evaluate(*_, **__) -> dict[str, float]:
        step = trainer.state.global_step
        metrics = {"eval_acc": accuracy[step], **{name: values[step] for name, values in more.items()}}
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate
    return trainer


def steps_of(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory."""
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))


def best_of(trainer: DFTTrainer) -> tuple[int | None, float | None, str | None]:
    state = trainer.state
    return (
        state.best_global_step,
        state.best_metric,
        state.best_model_checkpoint and Path(state.best_model_checkpoint).name,
    )


@pytest.mark.parametrize("loads_best", [False, True])
@pytest.mark.parametrize("limit", [1, 2, None])
def test_the_best_that_was_saved_and_the_newest_are_there(make_trainer, tmp_path, limit, loads_best):
    """The best evaluation is of step 3, between the saves of steps 2 and 4."""
    settings = {**STEPS, "eval_steps": 1, "save_steps": 2, "max_steps": 6, "save_total_limit": limit}
    results = {1: 0.1, 2: 0.6, 3: 0.9, 4: 0.5, 5: 0.4, 6: 0.3}
    trainer = with_results(make_trainer(**settings, load_best_model_at_end=loads_best), results)
    trainer.train()
    assert best_of(trainer) == (2, 0.6, "checkpoint-2")
    assert steps_of(tmp_path) == ([2, 6] if limit else [2, 4, 6])
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert trainer.args.save_total_limit == limit


def test_they_are_there_after_every_save(make_trainer, tmp_path):
    class Look(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_save(self, args, state, control, **kwargs):
            self.seen.append((steps_of(tmp_path), state.best_global_step))

    settings = {**STEPS, "eval_steps": 1, "save_steps": 1, "max_steps": 5, "save_total_limit": 1}
    trainer, look = with_results(make_trainer(**settings), {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.7}), Look()
    trainer.add_callback(look)
    trainer.train()
    assert look.seen == [([1], 1), ([2], 2), ([2, 3], 2), ([2, 4], 2), ([5], 5)]


def test_saves_that_are_not_evaluated_are_never_the_best(make_trainer, tmp_path):
    """Evaluated are 2, 4, 6 and, at the end, 7; saved are 3, 6 and, at the end, 7."""
    settings = {**STEPS, "eval_steps": 2, "save_steps": 3, "max_steps": 7, "save_total_limit": 1}
    trainer = with_results(make_trainer(**settings), {2: 0.9, 4: 0.8, 6: 0.5, 7: 0.4})
    trainer.train()
    assert best_of(trainer) == (6, 0.5, "checkpoint-6")
    assert steps_of(tmp_path) == [6, 7]


def test_without_a_metric_the_newest_are_kept(make_trainer, tmp_path):
    settings = {**STEPS, "metric_for_best_model": None, "eval_steps": 2, "save_steps": 1, "max_steps": 4}
    trainer = with_results(make_trainer(**settings, save_total_limit=1), {2: 0.9, 4: 0.1})
    trainer.train()
    assert best_of(trainer) == (None, None, None)
    assert steps_of(tmp_path) == [4]


@pytest.mark.parametrize(
    ("evaluates", "saves"), [("epoch", "steps"), ("steps", "epoch"), ("epoch", "epoch"), ("steps", "best")]
)
def test_a_step_may_be_saved_before_it_is_evaluated_or_after(make_trainer, tmp_path, evaluates, saves):
    """An epoch has 4 steps; what is done at its end comes after what is done every 4 steps."""
    settings = {**STEPS, "eval_strategy": evaluates, "save_strategy": saves, "eval_steps": 4, "save_steps": 4}
    settings |= {"max_steps": 12, "per_device_train_batch_size": 4, "save_total_limit": 1, "save_only_model": False}
    trainer = with_results(make_trainer(**settings), {4: 0.3, 8: 0.7, 12: 0.5})
    trainer.train()
    assert best_of(trainer) == (8, 0.7, "checkpoint-8")
    newest = [] if saves == "best" else [12]
    assert steps_of(tmp_path) == [8, *newest]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-8"
    assert [record["step"] for record in state["log_history"] if "eval_acc" in record] == [4, 8]
    assert not list(tmp_path.glob("**/*unfinished*"))
    check_whole(tmp_path / "checkpoint-8")


def test_a_model_that_is_loaded_at_the_end_is_that_of_the_best(make_trainer, tmp_path):
    """Between saves, the model at its best is gone; the final model is the best that was saved."""
    settings = {**STEPS, "eval_steps": 1, "save_steps": 2, "max_steps": 4, "save_total_limit": 1, "learning_rate": 0.1}
    trainer = with_results(make_trainer(**settings, load_best_model_at_end=True), {1: 0.1, 2: 0.6, 3: 0.9, 4: 0.5})
    trainer.train()
    trainer.save_model(tmp_path / "final")
    final, best, newest = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("final", "checkpoint-2", "checkpoint-4")
    )
    assert final == best != newest


def test_early_stopping_still_sees_that_nothing_gets_better(make_trainer):
    settings = {**STEPS, "eval_steps": 1, "save_steps": 1, "max_steps": 8}
    trainer = with_results(make_trainer(**settings), {1: 0.3, 2: 0.5, 3: 0.4, 4: 0.4, 5: 0.4, 6: 0.4})
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 4
    unsaved = with_results(make_trainer(**settings | {"save_strategy": "no"}), dict.fromkeys(range(9), 0.4))
    unsaved.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    unsaved.train()
    assert unsaved.state.global_step == 3


# ---- resuming -----------------------------------------------------------------------------------

RESUMABLE = {
    **STEPS,
    "eval_steps": 1,
    "save_steps": 1,
    "max_steps": 3,
    "save_total_limit": 2,
    "save_only_model": False,
}


def resumed(make_trainer: Callable, checkpoint: Path, results: dict[str, dict[int, float]], **settings) -> DFTTrainer:
    trainer = with_results(make_trainer(**RESUMABLE | {"max_steps": 5} | settings), **results)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.fixture
def earlier(make_trainer, tmp_path) -> Path:
    """The directory of a run of 3 steps, the best and last of which are there."""
    results = {"accuracy": {1: 0.2, 2: 0.6, 3: 0.4}, "eval_ce_loss": {1: 3.0, 2: 2.5, 3: 2.0}}
    with_results(make_trainer(**RESUMABLE), **results).train()
    assert steps_of(tmp_path) == [2, 3]
    return tmp_path


def test_the_best_of_the_earlier_run_stays(make_trainer, earlier):
    trainer = resumed(make_trainer, earlier / "checkpoint-3", {"accuracy": {4: 0.5, 5: 0.3}})
    assert best_of(trainer) == (2, 0.6, "checkpoint-2")
    assert steps_of(earlier) == [2, 5]


def test_the_best_is_found_where_the_directory_was_moved(make_trainer, earlier, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "out"
    shutil.move(earlier, moved)
    trainer = resumed(
        make_trainer, moved / "checkpoint-3", {"accuracy": {4: 0.5, 5: 0.3}}, load_best_model_at_end=True
    )
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-2")
    assert steps_of(earlier) == [4, 5]  # the directory of the output, made anew


def test_another_metric_chooses_anew(make_trainer, earlier):
    """By the cross-entropy, step 3 is the best of the earlier run; 0.6, an accuracy, is no cross-entropy."""
    results = {"accuracy": {4: 0.5, 5: 0.5}, "eval_ce_loss": {4: 1.5, 5: 2.2}}
    settings = {"metric_for_best_model": "eval_ce_loss", "greater_is_better": False}
    trainer = resumed(make_trainer, earlier / "checkpoint-3", results, **settings)
    assert best_of(trainer) == (4, 1.5, "checkpoint-4")
    assert steps_of(earlier) == [4, 5]


def test_a_best_that_is_gone_or_was_never_saved_is_forgotten(make_trainer, earlier, caplog):
    """The state of older versions may name a step between two saves."""
    path = earlier / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    state |= {"best_metric": 0.95, "best_global_step": 1, "best_model_checkpoint": None}
    state["log_history"][0]["eval_acc"] = 0.95
    path.write_text(json.dumps(state))
    (earlier / "checkpoint-3" / "manifest.json").unlink()
    shutil.rmtree(earlier / "checkpoint-2")
    trainer = resumed(make_trainer, earlier / "checkpoint-3", {"accuracy": {4: 0.5, 5: 0.3}})
    assert best_of(trainer) == (4, 0.5, "checkpoint-4")
    assert steps_of(earlier) == [4, 5]
    assert "The best checkpoint was that of step 1" in caplog.text


# ---- what is said at the start ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval_steps": 1, "save_steps": 2}, "every 1 steps and checkpoints every 2 steps"),
        ({"eval_steps": 2, "save_steps": 1}, "every 2 steps and checkpoints every 1 steps"),
        ({"eval_strategy": "epoch", "save_steps": 2}, "every epoch and checkpoints every 2 steps"),
        ({"save_strategy": "epoch", "eval_steps": 2}, "every 2 steps and checkpoints every epoch"),
        ({"eval_steps": 2, "save_steps": 2}, None),
        ({"eval_steps": 0.5, "save_steps": 1}, None),  # half of the 2 steps
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, None),
        ({"save_strategy": "best", "eval_steps": 1, "save_steps": 2}, None),
        ({"save_strategy": "no", "eval_steps": 1}, None),
        ({"eval_steps": 1, "save_steps": 2, "metric_for_best_model": None}, None),
        ({"eval_strategy": "no", "save_steps": 2}, None),
    ],
)
def test_steps_that_do_not_meet_are_said_at_the_start(make_trainer, caplog, settings, said):
    for limit, levels in ((1, ["WARNING"]), (None, [])):
        caplog.clear()
        results = dict.fromkeys(range(20), 0.5)
        with_results(make_trainer(**STEPS | settings, max_steps=2, save_total_limit=limit), results).train()
        found = [record for record in caplog.records if "Evaluations come" in record.message]
        assert [record.levelname for record in found] == (levels if said else [])
        assert all(said in record.message and "--save_strategy best" in record.message for record in found)
