"""What a run shows while it trains: a line for each record, trackers that may fail, curves at every save."""

import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter, ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from wandb.errors import UsageError

from dft.errors import UserError
from dft.tracking.console import print_lines, record_line, summary
from dft.tracking.curves import Curves
from dft.tracking.tracker_checks import PROJECT_NAMES, check_trackers
from dft.tracking.tracker_guard import GuardedTracker, guard_trackers
from dft.tracking.tracker_start import TrackerIds, start_tensorboard
from dft.tracking.train_log import TrainLog


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


def test_lines_stand_above_a_progress_bar(make_trainer, capsys):
    trainer = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=3, disable_tqdm=False)
    print_lines(trainer)
    trainer.train()
    shown = capsys.readouterr()
    assert [text.split("  ")[0] for text in shown.out.splitlines()] == [f"step {i}/3" for i in (1, 2, 3, 3)]
    assert "3/3" in shown.err
    assert "{" not in shown.out + shown.err


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


@pytest.fixture
def trackers(tmp_path, monkeypatch):
    """A command line's trackers, without keys, and no variable of theirs set."""
    for variable in ("SWANLAB_MODE", "SWANLAB_LOG_DIR", "SWANLAB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def check(*names: str, rank: int = 0) -> dict[str, str]:
        args = {"report_to": names, "process_index": rank, "output_dir": str(tmp_path / "out"), "project": "dft"}
        return check_trackers(SimpleNamespace(**args))

    return check


def test_trackers_without_a_key_write_to_disk(trackers, caplog, tmp_path):
    assert trackers("swanlab", "wandb", "tensorboard") == {"swanlab": "offline", "wandb": "offline", "tensorboard": ""}
    assert f"`swanlab sync {tmp_path}/out/swanlog/run-*`" in caplog.text
    assert f"`wandb sync {tmp_path}/out/wandb/offline-run-*`" in caplog.text
    assert trackers("swanlab", rank=1) == {}


def test_a_tracker_whose_server_fails_writes_to_disk(trackers, caplog, monkeypatch):
    """A key that is no key is refused before anything goes over the network."""
    monkeypatch.setenv("WANDB_API_KEY", "bad")
    assert trackers("wandb") == {"wandb": "offline"}
    assert "its server can't be used (WANDB_API_KEY invalid" in caplog.text


def test_the_projects_name_that_swanlab_fails_on(trackers, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    assert trackers("swanlab") == {"swanlab": "offline"}
    assert "SWANLAB_PROJECT" not in os.environ
    assert os.environ["SWANLAB_PROJ_NAME"] == "mine"


def test_modes_that_need_no_server_are_left_alone(trackers, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    assert trackers("wandb", "swanlab") == {"wandb": "disabled", "swanlab": "offline"}
    assert caplog.text == ""


def test_a_tracker_without_its_package_is_dropped(trackers, caplog, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "local")
    monkeypatch.setattr("dft.tracking.tracker_checks.find_spec", lambda name: None)
    assert list(trackers("swanlab", "tensorboard", "comet_ml")) == ["tensorboard"]
    assert "pip install 'swanlab[dashboard]'" in caplog.text
    assert "--report_to comet_ml: it can't start" in caplog.text


@pytest.mark.parametrize(
    ("name", "variable", "value", "message"),
    [
        ("swanlab", "SWANLAB_MODE", "lokal", "SWANLAB_MODE is lokal; it must be one of online, cloud, offline, local"),
        ("wandb", "WANDB_MODE", "x", "WANDB_MODE is x; it must be one of online, offline"),
        ("swanlab", "SWANLAB_PROJ_NAME", "my runs", "SWANLAB_PROJ_NAME is 'my runs'; swanlab takes 1 to 100 letters"),
        ("wandb", "WANDB_PROJECT", "a/b", "WANDB_PROJECT is 'a/b'; wandb takes 1 to 128 characters"),
        ("swanlab", "SWANLAB_LOG_DIR", "/proc/x", "SWANLAB_LOG_DIR /proc/x can't be made"),
        ("wandb", "WANDB_DIR", "/proc/x", "WANDB_DIR /proc/x can't be made"),
        ("tensorboard", "TENSORBOARD_LOGGING_DIR", "/proc/x", "TENSORBOARD_LOGGING_DIR /proc/x can't be made"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_mistakes_about_trackers_stop_every_rank(trackers, monkeypatch, name, variable, value, message, rank):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        trackers(name, rank=rank)


@pytest.mark.parametrize("name", ["swanlab", "wandb"])
def test_names_of_projects_are_what_the_tracker_takes(trackers, monkeypatch, name):
    """Refused here is what it refuses; at the start of a run that would be too late."""
    from swanlab.sdk.internal.pkg.constraints import ProjectName
    from wandb.sdk.wandb_settings import Settings

    accepts = {"swanlab": TypeAdapter(ProjectName).validate_python, "wandb": lambda value: Settings(project=value)}
    for value in (
        "dft",
        "my-runs_1.0+",
        "my runs",
        "a/b",
        "a\\b",
        "a#b",
        "a?b",
        "a%b",
        "a:b",
        "中文",
        "x" * 101,
        "x" * 129,
    ):
        monkeypatch.setenv(PROJECT_NAMES[name][0], value)
        try:
            accepts[name](value)
        except (ValidationError, UsageError):
            with pytest.raises(UserError, match="takes 1 to 1"):
                trackers(name)
        else:
            assert list(trackers(name)) == [name], value


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
            drawn.append(curves.path.read_bytes())
            curves.path.unlink()

    trainer.add_callback(curves)
    trainer.add_callback(Watch())
    trainer.train()
    assert len(drawn) == 2
    for picture in drawn:
        assert picture.startswith(b"\x89PNG")
        assert b"IEND" in picture[-12:]  # the last chunk: the picture is whole


def test_the_log_of_a_resumed_run_begins_with_what_its_checkpoint_knows(tmp_path):
    """Whatever lies there: the checkpoint may be another directory's, the machine may have gone down."""
    log = TrainLog(str(tmp_path))
    log.path.write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 8.0}\n{"step": 3, "lo')
    history = [{"loss": 2.0, "step": 1}, {"loss": float("nan"), "step": 2}]
    state = TrainerState(global_step=2, is_world_process_zero=True, log_history=history)
    log.on_train_begin(None, state, None)
    assert log.path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n'
    state.global_step = 3
    log.on_log(None, state, None, logs={"loss": 1.0})
    assert log.path.read_text().splitlines()[2:] == ['{"step": 3, "loss": 1.0}']
    log.on_train_begin(None, TrainerState(is_world_process_zero=True, log_history=history), None)  # tried again
    assert log.path.read_text() == ""


def test_broken_names_begin_a_new_run(tmp_path, caplog):
    (tmp_path / "tracker_ids.json").write_text('{"wandb')
    assert TrackerIds(tmp_path, steps_done=3).resume_arguments("wandb") == {}
    assert "the trackers begin a new run" in caplog.text


def test_a_resumed_run_goes_on_in_its_trackers(tmp_path):
    first = TrackerIds(tmp_path)
    assert first.resume_arguments("wandb") == {}
    first.save("wandb", "abc")
    first.save("swanlab", "def")
    resumed = TrackerIds(tmp_path, steps_done=3)
    assert resumed.resume_arguments("wandb") == {"id": "abc", "resume": "allow"}
    assert resumed.resume_arguments("tensorboard") == {}
    anew = TrackerIds(tmp_path)
    assert anew.resume_arguments("swanlab") == {}


def test_the_last_step_is_recorded(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=2)
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "ce_loss" in r] == [2, 3]
    silent = make_trainer(max_steps=3, logging_strategy="no")
    silent.train()
    assert not [r for r in silent.state.log_history if "ce_loss" in r]


def test_a_run_ends_with_a_summary(make_trainer):
    """Its tokens are those of all steps, whatever was logged."""
    trainer = make_trainer(max_steps=3, per_device_train_batch_size=16, eval_strategy="steps", eval_steps=1)
    result = trainer.train()
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    supervised = sum(sum(label != -100 for label in labels[1:]) for labels in trainer.train_dataset["labels"])
    assert result.metrics["train_tokens"] == 3 * tokens
    assert result.metrics["train_supervised_tokens"] == 3 * supervised
    speed = result.metrics["train_tokens_per_second"]
    assert speed > 3 * tokens / result.metrics["train_runtime"]  # without the evaluations
    text = summary(trainer)
    duration = timedelta(seconds=round(result.metrics["train_runtime"]))
    assert text.startswith(f"Done: 3 steps in {duration}, {3 * tokens:,} tokens, ")
    for key in ("ce_loss", "train/avg_p_correct", "eval_ce_loss", "eval_acc"):
        first, *_, last = [r[key] for r in trainer.state.log_history if key in r]
        assert f" {first:.4f} at step 1 -> {last:.4f} at step 3" in text
    assert f"python scripts/chat.py {trainer.args.output_dir}\n" in text
    assert f"  {trainer.args.output_dir}\n" in text
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_acc"
    trainer.state.best_model_checkpoint, trainer.state.best_global_step, trainer.state.best_metric = "c", 2, 0.5
    assert f"  {trainer.args.output_dir} (weights of step 2)\n" in summary(trainer)
    trainer.state.log_history[-1]["train_steps"] = 2
    assert summary(trainer).startswith(f"Done: 3 steps, 2 of them since the run was resumed, in {duration}, ")


def test_the_speed_is_that_of_training_alone(make_trainer):
    """Drawing the curves, say, takes its time and not the training's. The time slept is a lower bound."""

    class Slow(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            time.sleep(0.25)

        on_log = on_save

    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=1)
    trainer.add_callback(Slow())
    result = trainer.train()
    seconds = result.metrics["train_tokens"] / result.metrics["train_tokens_per_second"]
    assert result.metrics["train_runtime"] - seconds > 7 * 0.25  # 4 saves and 4 records, of which one may come first


def test_tensorboards_directory_has_the_name_of_the_run(monkeypatch, tmp_path):
    """Another run of the name has one of its own, a resumed run has the same."""
    variable = "TENSORBOARD_LOGGING_DIR"
    args = TrainingArguments(output_dir=str(tmp_path), run_name="first/try", report_to="none")

    def directory(steps_done: int = 0, args=args, chosen: Path | None = None) -> Path:
        monkeypatch.delenv(variable, raising=False)
        if chosen is not None:
            monkeypatch.setenv(variable, str(chosen))
        start_tensorboard(args, "", {}, TrackerIds(tmp_path, steps_done))
        return Path(os.environ[variable])

    first = directory()
    assert first == tmp_path / "runs" / "first_try"
    second = directory()
    assert second.parent == first.parent
    assert second.name.startswith("first_try_")
    assert directory(steps_done=3) == second
    nameless = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    assert "first" not in directory(args=nameless).name
    dots = TrainingArguments(output_dir=str(tmp_path), run_name="..", report_to="none")
    assert directory(args=dots).parent == first.parent
    assert directory(chosen=tmp_path / "chosen") == tmp_path / "chosen" / "first_try"


def test_tensorboard_has_each_step_once_and_knows_what_the_run_is(monkeypatch, tmp_path):
    """Steps 3 and 4 were recorded before a crash, and again by the run that went on from a checkpoint of step 2."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    args = TrainingArguments(output_dir=str(tmp_path), run_name="mine", report_to="none")
    for steps_done, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "boards")
        start_tensorboard(args, "", {"dft": {"dft_alpha": 0.25}}, TrackerIds(tmp_path, steps_done))
        with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            for step in steps:
                writer.add_scalar("train/loss", 10 * steps_done + step, step)
    recorded = EventAccumulator(str(tmp_path / "boards" / "mine"))
    recorded.Reload()
    found = [(event.step, event.value) for event in recorded.Scalars("train/loss")]
    assert found == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
    about = recorded.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"dft_alpha": 0.25' in about
