"""SwanLab, WandB, TensorBoard: checked before anything is loaded, started with what a run is, unable to end it."""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, default_logdir

from dft.errors import UserError
from dft.files import make_directory

logger = logging.getLogger(__name__)

# the modes of each, and the variable that chooses one
MODES = {
    "swanlab": ("SWANLAB_MODE", ("online", "cloud", "offline", "local", "disabled")),
    "wandb": ("WANDB_MODE", ("online", "offline", "shared", "disabled", "dryrun", "run")),
}

# the variable that names the project, before --project does; the names that are taken; the same in words
PROJECT_NAMES = {
    "swanlab": ("SWANLAB_PROJ_NAME", r"[0-9a-zA-Z_+.-]{1,100}", "1 to 100 letters, digits, or of - _ . +"),
    "wandb": ("WANDB_PROJECT", r"[^/\\#?%:]{1,128}", "1 to 128 characters, none of / \\ # ? % :"),
}


# ---- before a run -------------------------------------------------------------------------------


def check_trackers(args: TrainingArguments) -> dict[str, str]:
    """The trackers of `report_to` that can be used, and their modes. Called by every rank, before anything is loaded.

    One without its package is dropped with a warning. One without an API key, or whose server doesn't accept it or
    can't be reached, will write to disk, with a warning that says how to upload that. Only rank 0 tracks.

    Raises:
        UserError: an unknown mode, a project's name that the tracker doesn't take, or a directory that can't be
            written to.
    """
    if "SWANLAB_PROJECT" in os.environ:  # transformers documents this name, on which swanlab fails
        os.environ["SWANLAB_PROJ_NAME"] = os.environ.pop("SWANLAB_PROJECT")
    usable = {}
    for name in args.report_to:
        check_mode(name)
        check_project(name, args)
        make_directory(*directory_of(name, args))
        if args.process_index == 0:
            with going_on_without(name):
                INTEGRATION_TO_CALLBACK[name]()  # says what is missing
                usable[name] = choose_mode(name, args) if name in MODES else ""
    return usable


@contextmanager
def going_on_without(name: str) -> Iterator[None]:
    """Around what a tracker does before a run: a failure is a warning."""
    try:
        yield
    except Exception as error:  # whatever it is, a tracker must not end a training run
        logger.warning("--report_to %s: it can't start, going on without it: %s", name, error)


def check_mode(name: str) -> None:
    """Raises UserError for a mode that a tracker doesn't have."""
    variable, modes = MODES.get(name, ("", ()))
    mode = os.environ.get(variable)
    if mode and mode not in modes:
        raise UserError(f"{variable} is {mode}; it must be one of {', '.join(modes)}")


def check_project(name: str, args: TrainingArguments) -> None:
    """Raises UserError for a project's name that a tracker doesn't take."""
    if name not in PROJECT_NAMES:
        return
    _, pattern, rule = PROJECT_NAMES[name]
    project, setting = project_of(name, args)
    if not re.fullmatch(pattern, project):
        raise UserError(f"{setting} is {project!r}; {name} takes {rule}")


def project_of(name: str, args: TrainingArguments) -> tuple[str, str]:
    """What a tracker is told to call the project, and the setting that says so."""
    variable, *_ = PROJECT_NAMES[name]
    chosen = os.environ.get(variable)
    return (chosen, variable) if chosen else (args.project, "--project")


def directory_of(name: str, args: TrainingArguments) -> tuple[str, str]:
    """Where a tracker writes to, and the setting that says so."""
    settings = {
        "swanlab": ("SWANLAB_LOG_DIR", os.path.join(args.output_dir, "swanlog")),
        "wandb": ("WANDB_DIR", args.output_dir),
        "tensorboard": ("TENSORBOARD_LOGGING_DIR", os.path.join(args.output_dir, "runs")),
    }
    variable, default = settings.get(name, ("", args.output_dir))
    return os.environ.get(variable, default), variable if variable in os.environ else "--output_dir"


def choose_mode(name: str, args: TrainingArguments) -> str:
    """A tracker's mode: offline where it would be online and can't be."""
    variable, _ = MODES[name]
    mode = os.environ.get(variable) or "online"
    mode = {"cloud": "online", "run": "online"}.get(mode, mode)
    if name == "swanlab" and mode == "local" and not find_spec("swanboard"):
        raise ImportError("its local mode needs a package more: pip install 'swanlab[dashboard]'")
    reason = why_not_online(name) if mode == "online" else ""
    if reason:
        directory, _ = directory_of(name, args)
        where, runs = {"swanlab": (directory, "run-*"), "wandb": (f"{directory}/wandb", "offline-run-*")}[name]
        logger.warning(
            "%s: %s, so the run is written to %s; upload it with `%s sync %s/%s`",
            *(name, reason, where, name, shlex.quote(where), runs),
        )
    return "offline" if reason else mode


def why_not_online(name: str) -> str:
    """Why SwanLab's or WandB's server can't be used; "" where it can."""
    if name == "swanlab":
        import swanlab

        if not swanlab.Settings().api_key:  # it would ask for one
            return "no API key"
        login = swanlab.login
    else:
        import wandb

        login = partial(wandb.login, prompt=False)
    try:
        return "" if login() else "no API key"
    except Exception as error:  # of the network, of the server, of the key
        return f"its server can't be used ({error})"


# ---- the start of a run -------------------------------------------------------------------------


def start_trackers(
    args: TrainingArguments, modes: dict[str, str], about: dict[str, Any], steps_done: int = 0
) -> list[str]:
    """Starts trackers, and returns those that did. A run that is resumed goes on where it stopped.

    Args:
        modes: see `check_trackers`.
        about: recorded with the run, see run_facts.about_run.
        steps_done: of the run that is resumed.
    """
    if args.process_index != 0:
        return []
    ids = TrackerIds(args.output_dir, steps_done)
    usable = []
    for name, mode in modes.items():
        start = {"swanlab": start_swanlab, "wandb": start_wandb, "tensorboard": start_tensorboard}.get(name)
        with going_on_without(name):
            if start is not None:
                start(args, mode, about, ids)
            usable.append(name)
    return usable


class TrackerIds:
    """The names that trackers gave to a run, kept in its output directory.

    Attributes:
        steps_done: of the run that is resumed; 0 for a new one.
    """

    def __init__(self, output_dir: str | Path, steps_done: int = 0):
        self.steps_done = steps_done
        self._path = Path(output_dir) / "tracker_ids.json"
        self._ids: dict[str, str] = {}
        if not steps_done:
            self._path.unlink(missing_ok=True)
        try:
            self._ids = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except ValueError as error:
            logger.warning("%s is broken (%s): the trackers begin a new run", self._path, error)

    def earlier(self, tracker: str) -> str | None:
        """The name that a tracker gave to the run that is resumed, if it did."""
        return self._ids.get(tracker)

    def to_go_on(self, tracker: str) -> dict[str, str]:
        """What SwanLab and WandB are told so that they go on with an earlier run, if there is one."""
        return {"id": self._ids[tracker], "resume": "allow"} if tracker in self._ids else {}

    def keep(self, tracker: str, name: str) -> None:
        self._ids[tracker] = name
        self._path.write_text(json.dumps(self._ids) + "\n", encoding="utf-8")


def start_swanlab(args: TrainingArguments, mode: str, about: dict[str, Any], ids: TrackerIds) -> None:
    """Starts SwanLab's run here, because transformers' callback fails where no run exists yet.

    SWANLAB_LOG_DIR and SWANLAB_PROJ_NAME are respected.
    """
    import swanlab

    if mode == "local":  # whose page shows a nested setting as [object Object]
        about = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in about.items()}
    settings = {"project": project_of("swanlab", args)[0], "name": args.run_name, "mode": mode, "config": about}
    run = swanlab.init(log_dir=directory_of("swanlab", args)[0], **settings, **ids.to_go_on("swanlab"))
    ids.keep("swanlab", run.id)


def start_wandb(args: TrainingArguments, mode: str, about: dict[str, Any], ids: TrackerIds) -> None:
    """Starts WandB's run. WANDB_DIR and WANDB_PROJECT are respected."""
    import wandb

    settings = {"project": project_of("wandb", args)[0], "name": args.run_name, "mode": mode, "config": about}
    run = wandb.init(dir=directory_of("wandb", args)[0], **settings, **ids.to_go_on("wandb"))
    ids.keep("wandb", run.id)


def start_tensorboard(args: TrainingArguments, mode: str, about: dict[str, Any], ids: TrackerIds) -> None:
    """Chooses TensorBoard's directory, by whose name it lists the run, and writes there what the run is.

    It lies in TENSORBOARD_LOGGING_DIR, and that names it from here on, for transformers' callback. Another run of the
    name gets the time in its own: in one directory the curves would be mixed.
    """
    from torch.utils.tensorboard import SummaryWriter

    earlier, now = ids.earlier("tensorboard"), Path(default_logdir()).name
    runs, name = Path(directory_of("tensorboard", args)[0]), earlier or (args.run_name or now).replace(os.sep, "_")
    if not name.strip("."):  # . and .. are other directories
        name = now
    if earlier is None and (runs / name).exists():
        name = f"{name}_{now}"
    # what an interrupted run recorded behind its last checkpoint is recorded anew
    with SummaryWriter(str(runs / name), purge_step=ids.steps_done + 1 if ids.steps_done else None) as writer:
        writer.add_text("run", f"```\n{json.dumps(about, indent=1, ensure_ascii=False)}\n```", ids.steps_done)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(runs / name)
    ids.keep("tensorboard", name)


# ---- while it goes on ---------------------------------------------------------------------------


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
