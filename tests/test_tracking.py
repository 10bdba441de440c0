"""What a run shows while it trains: a line for each record, trackers that may fail, curves at every save."""

import json
import os
import sys
from importlib.metadata import version

import pytest
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from console import print_lines, record_line
from tracking import Curves, GuardedTracker, TrackerIds, about_run, guard_trackers, name_tensorboard


def test_a_record_is_one_line():
    record = {
        "loss": 0.17226,
        "ce_loss": 0.46397,
        "train/avg_p_correct": 0.8447,
        "learning_rate": 0.0018,
        "grad_norm": 0.39684,
        "tokens_per_second": 4335.6,
        "mfu": 0.4512,
        "memory_gib": 61.889,
        "epoch": 0.5,
    }
    assert record_line(record, 10, 200, 3661.0) == (
        "step 10/200  loss 0.1723  CE 0.4640  p 0.8447  lr 1.80e-03  grad 0.397  tok/s 4,336  MFU 45.1%  GiB 61.89  "
        "left 1:01:01"
    )
    evaluation = {"eval_chat_loss": 0.1, "eval_chat_ce_loss": 0.25, "eval_chat_acc": 0.9, "eval_chat_runtime": 2.0}
    assert (
        record_line(evaluation, 40, 200) == "step 40/200  eval_chat  loss 0.1000  CE 0.2500  acc 0.9000  seconds 2.0"
    )
    assert record_line({"train_runtime": 3.0, "train_loss": 0.1}, 200, 200) is None


def test_lines_take_the_place_of_dictionaries(make_trainer, capsys):
    trainer = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=3)
    print_lines(trainer)
    print_lines(trainer)  # there is nothing left to replace
    trainer.train()
    shown = capsys.readouterr().out
    assert [text.split("  ")[0] for text in shown.splitlines()] == [f"step {i}/3" for i in (1, 2, 3, 3)]
    assert "left 0:00:00" in shown.splitlines()[2]
    assert "\r" not in shown
    assert "{" not in shown


class Failing(TrainerCallback):
    """A tracker whose network goes away."""

    def __init__(self):
        self.calls = []

    def on_log(self, args, state, control, **kwargs):
        self.calls.append(state.global_step)
        if state.global_step == 2:
            raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(make_trainer, monkeypatch, caplog):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "failing", Failing)
    trainer = make_trainer(max_steps=4)
    tracker = Failing()
    trainer.add_callback(tracker)
    guard_trackers(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert tracker.calls == [1, 2]
    assert caplog.text.count("Failing failed and is dropped, the run goes on: ConnectionError") == 1


def test_what_a_tracker_decides_is_passed_on():
    class Stopping(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return (args, state, control, kwargs)

    assert GuardedTracker(Stopping()).on_step_end(1, 2, 3, model=4) == (1, 2, 3, {"model": 4})


def test_other_callbacks_may_end_the_run(make_trainer):
    trainer = make_trainer(max_steps=4)
    trainer.add_callback(Failing())
    guard_trackers(trainer)
    with pytest.raises(ConnectionError):
        trainer.train()


def test_curves_are_drawn_at_every_save(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    curves, drawn = Curves(str(tmp_path)), []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            drawn.append(curves.path.stat().st_size)
            curves.path.unlink()

    trainer.add_callback(curves)
    trainer.add_callback(Watch())
    trainer.train()
    assert len(drawn) == 2
    assert min(drawn) > 10_000


def test_a_resumed_run_goes_on_in_its_trackers(tmp_path):
    first = TrackerIds(tmp_path, is_resumed=False)
    assert first.to_go_on("wandb") == {}
    first.keep("wandb", "abc")
    first.keep("swanlab", "def")
    resumed = TrackerIds(tmp_path, is_resumed=True)
    assert resumed.to_go_on("wandb") == {"id": "abc", "resume": "allow"}
    assert resumed.to_go_on("tensorboard") == {}
    anew = TrackerIds(tmp_path, is_resumed=False)
    assert anew.to_go_on("swanlab") == {}


def test_what_is_recorded_of_a_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_dft.py", "--data_files", "a b.jsonl"])
    about = about_run({"dft_alpha": 0.7}, {"a b.jsonl": 3})
    assert about["dft"] == {"dft_alpha": 0.7}
    assert about["data_rows"] == {"a b.jsonl": 3}
    assert about["versions"]["torch"] == version("torch")
    assert about["command_line"] == "train_dft.py --data_files 'a b.jsonl'"
    json.dumps(about)


def test_tensorboards_directory_has_the_name_of_the_run(monkeypatch, tmp_path):
    name = "TENSORBOARD_LOGGING_DIR"
    args = TrainingArguments(output_dir=str(tmp_path), run_name="first/try", report_to="none")
    monkeypatch.setenv(name, "chosen")
    name_tensorboard(args)
    assert os.environ[name] == "chosen"
    monkeypatch.delenv(name)
    name_tensorboard(args)
    assert os.environ[name] == str(tmp_path / "runs" / "first_try")
    os.makedirs(os.environ.pop(name))
    name_tensorboard(args)
    assert os.environ[name].startswith(str(tmp_path / "runs" / "first_try_"))
    os.environ.pop(name)
    name_tensorboard(TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    assert name not in os.environ


def test_code_outside_a_repository_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("tracking.__file__", str(tmp_path / "tracking.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert about_run({}, {})["git_commit"] is None
