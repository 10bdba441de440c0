"""What a run shows: trackers, train_log.jsonl, the curves, and the summary at the end."""

import json
import math
import os
import shlex
import subprocess
import sys
from functools import partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, default_logdir

from dist_logger import get_logger

logger = get_logger(__name__)


# ---- trackers -----------------------------------------------------------------------------------


def start_trackers(
    args: TrainingArguments, settings: dict[str, Any], files: dict[str, int], is_resumed: bool = False
) -> list[str]:
    """Starts the trackers that have to be started early, and returns the usable ones for `report_to`.

    Called before the model is loaded. A tracker without its package is dropped with a warning; one
    without an API key writes to disk, with a warning that says how to upload it. Only rank 0 tracks. A run that is
    resumed goes on in the trackers where it stopped.

    Args:
        settings, files: recorded with the run, see `about_run`.
    """
    if args.process_index != 0 or not args.report_to:
        return []
    about, ids = about_run(settings, files), TrackerIds(args.output_dir, is_resumed)
    usable = []
    for name in args.report_to:
        try:
            if name == "swanlab":
                start_swanlab(args, about, ids)
            elif name == "wandb":
                start_wandb(args, about, ids)
            elif name == "tensorboard":
                name_tensorboard(args)
            INTEGRATION_TO_CALLBACK[name]()  # says what is missing
            usable.append(name)
        except Exception as error:  # whatever it is, a tracker must not end a training run
            logger.warning("--report_to %s: it can't start, going on without it: %s", name, error)
    return usable


def about_run(settings: dict[str, Any], files: dict[str, int]) -> dict[str, Any]:
    """What a run was: its own settings, rows by data file, versions, the commit of the code, the command line."""
    packages = ("torch", "transformers", "accelerate", "deepspeed", "datasets")
    return {
        "dft": settings,
        "data_rows": files,
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "command_line": shlex.join(sys.argv),
    }


def _git_commit() -> str | None:
    """The commit of the code; None where it is not in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class TrackerIds:
    """The names that trackers gave to a run, kept in its output directory."""

    def __init__(self, output_dir: str | Path, is_resumed: bool):
        self._path = Path(output_dir) / "tracker_ids.json"
        is_kept = is_resumed and self._path.is_file()
        self._ids = json.loads(self._path.read_text(encoding="utf-8")) if is_kept else {}

    def to_go_on(self, tracker: str) -> dict[str, str]:
        """What a tracker is told so that it goes on with an earlier run, if there is one."""
        return {"id": self._ids[tracker], "resume": "allow"} if tracker in self._ids else {}

    def keep(self, tracker: str, name: str) -> None:
        self._ids[tracker] = name
        self._path.write_text(json.dumps(self._ids) + "\n", encoding="utf-8")


def start_swanlab(args: TrainingArguments, about: dict[str, Any], ids: TrackerIds) -> None:
    """Starts SwanLab's run here, because transformers' callback fails where no run exists yet.

    SWANLAB_MODE (online, offline, local, disabled) and SWANLAB_PROJECT are respected.
    """
    import swanlab

    project = os.environ.pop("SWANLAB_PROJECT", args.project)  # swanlab itself fails on this variable
    log_dir = os.environ.get("SWANLAB_LOG_DIR", os.path.join(args.output_dir, "swanlog"))
    mode = {"cloud": "online"}.get(os.environ.get("SWANLAB_MODE"), os.environ.get("SWANLAB_MODE"))
    if mode is None and not swanlab.Settings().api_key:
        mode = "offline"
        logger.warning(
            "SwanLab: no API key, so the run is written to %s; upload it with `swanlab sync %s/run-*`",
            log_dir,
            log_dir,
        )
    os.makedirs(log_dir, exist_ok=True)
    if mode == "local":  # whose page shows a nested setting as [object Object]
        about = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in about.items()}
    settings = {"project": project, "name": args.run_name, "mode": mode, "log_dir": log_dir, "config": about}
    run = swanlab.init(**settings, **ids.to_go_on("swanlab"))
    ids.keep("swanlab", run.id)


def start_wandb(args: TrainingArguments, about: dict[str, Any], ids: TrackerIds) -> None:
    """Starts WandB's run. WANDB_MODE (online, offline, disabled), WANDB_PROJECT and WANDB_DIR are respected."""
    import wandb

    directory = os.environ.get("WANDB_DIR", args.output_dir)
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"
        where = os.path.join(directory, "wandb")
        logger.warning(
            "WandB: no API key, so the run is written to %s; upload it with `wandb sync %s/offline-run-*`",
            where,
            where,
        )
    os.makedirs(directory, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", args.project)
    settings = {"project": project, "name": args.run_name, "mode": mode, "dir": directory, "config": about}
    run = wandb.init(**settings, **ids.to_go_on("wandb"))
    ids.keep("wandb", run.id)


def name_tensorboard(args: TrainingArguments) -> None:
    """Lets TensorBoard list the run by its name, which is that of its directory. TENSORBOARD_LOGGING_DIR is respected.

    A second run of a name, resumed or anew, gets the time in its name: in one directory the curves would be mixed.
    """
    if args.run_name and "TENSORBOARD_LOGGING_DIR" not in os.environ:
        directory = Path(args.output_dir, "runs", args.run_name.replace(os.sep, "_"))
        if directory.exists():
            directory = directory.with_name(f"{directory.name}_{Path(default_logdir()).name}")
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(directory)


class GuardedTracker(TrainerCallback):
    """A tracker whose failure ends the tracking, with a warning, and not the run."""

    def __init__(self, callback: TrainerCallback):
        self.callback: TrainerCallback | None = callback
        self.name = type(callback).__name__.removesuffix("Callback")

    def call(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """What the tracker does at an event of the training."""
        if self.callback is None:
            return None
        try:
            return getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:  # whatever it is, a tracker must not end a training run
            logger.warning("%s failed and is dropped, the run goes on: %s: %s", self.name, type(error).__name__, error)
            self.callback = None
            return None


# every event goes through `call`
for _event in (name for name in vars(TrainerCallback) if name.startswith("on_")):
    setattr(GuardedTracker, _event, partialmethod(GuardedTracker.call, _event))


def guard_trackers(trainer: Trainer) -> None:
    """Lets the run go on whatever its trackers do."""
    handler, trackers = trainer.callback_handler, tuple(INTEGRATION_TO_CALLBACK.values())
    handler.callbacks = [GuardedTracker(c) if isinstance(c, trackers) else c for c in handler.callbacks]


class TrainLog(TrainerCallback):
    """Writes every log record as a line of train_log.jsonl: the step and the numbers logged at it."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / "train_log.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            # a resumed run keeps what was logged up to its checkpoint
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step > 0]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                record = {"step": state.global_step, **(logs or {})}
                # JSON has no NaN
                record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
                file.write(json.dumps(record) + "\n")


# ---- after training -----------------------------------------------------------------------------

PANELS = {  # title: {label: key of the log records}
    "Cross-entropy (nats per token)": {"train": "ce_loss", "evaluation": "eval_ce_loss"},
    "DFT loss": {"train": "loss", "evaluation": "eval_loss"},
    "Probability of the correct token": {
        "train": "train/avg_p_correct",
        "evaluation": "eval_avg_p_correct",
    },
    "Token accuracy": {"train": "token_accuracy", "evaluation": "eval_acc"},
    "Learning rate": {"learning rate": "learning_rate"},
    "Gradient norm": {"gradient norm": "grad_norm"},
}


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key of the trainer's log."""
    records = [r for r in log_history if key in r]
    return [r["step"] for r in records], [r[key] for r in records]


def plot_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training curves to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PANELS.items(), strict=True):
        for color, (label, key) in zip(("tab:blue", "tab:orange"), keys.items(), strict=False):
            steps, values = series(log_history, key)
            if steps:
                marker = "o" if label == "evaluation" or len(steps) == 1 else None
                axis.plot(steps, values, color=color, label=label, marker=marker, markersize=4)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


class Curves(TrainerCallback):
    """Draws the curves whenever a checkpoint is saved."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / "training_curves.png"

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_curves(state.log_history, self.path)


def summary(trainer: Trainer) -> str:
    """What a run achieved and where it left things, in a few lines."""
    history, state, out = trainer.state.log_history, trainer.state, Path(trainer.args.output_dir)
    lines = [f"Done: {state.global_step} steps"]
    for name, key in (
        ("training cross-entropy", "ce_loss"),
        ("training p_correct", "train/avg_p_correct"),
        ("evaluation cross-entropy", "eval_ce_loss"),
        ("evaluation accuracy", "eval_acc"),
    ):
        steps, values = series(history, key)
        if steps:
            lines.append(f"  {name:<25} {values[0]:.4f} at step {steps[0]} -> {values[-1]:.4f} at step {steps[-1]}")
    if state.best_model_checkpoint:
        lines.append(f"  best checkpoint           {state.best_model_checkpoint} ({state.best_metric:.4f})")
    lines += [
        f"  model                     {out}",
        f"  curves                    {out / 'training_curves.png'}",
        f"  talk to it                python scripts/chat.py {out}",
    ]
    return "\n".join(lines)
