"""Checks of the trackers before a run: their modes, projects, directories and keys, before anything is loaded.

SwanLab and WandB are checked in detail; TensorBoard and the others that transformers knows by what they need to start.
"""

import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from dft.errors import UserError
from dft.files import make_directory

logger = logging.getLogger(__name__)

# tracker: (the variable that chooses its mode, the modes that it knows)
MODES = {
    "swanlab": ("SWANLAB_MODE", ("online", "cloud", "offline", "local", "disabled")),
    "wandb": ("WANDB_MODE", ("online", "offline", "shared", "disabled", "dryrun", "run")),
}

# tracker: (the variable that names the project and overrides --project, the pattern of valid names, the same in words)
PROJECT_NAMES = {
    "swanlab": ("SWANLAB_PROJ_NAME", r"[0-9a-zA-Z_+.-]{1,100}", "1 to 100 letters, digits, or of - _ . +"),
    "wandb": ("WANDB_PROJECT", r"[^/\\#?%:\x00-\x1f\x7f-\x9f]{1,128}", "1 to 128 characters, none of / \\ # ? % :"),
}


def check_trackers(args: TrainingArguments, *, shared: bool = False) -> dict[str, str]:
    """Finds the trackers of `report_to` that can be used. Every rank calls it, so that all stop at a mistake.

    A tracker whose package is missing is dropped with a warning. One without an API key, or whose server refuses the
    key or can't be reached, is switched to writing to disk, with a warning that says how to upload that.

    Args:
        shared: new directories get the umask's modes.

    Returns:
        The mode of each usable tracker, "" for those without modes; nothing on other ranks than 0, which don't track.

    Raises:
        UserError: an unknown mode, an invalid project name, or a directory that can't be written to.
    """
    if "SWANLAB_PROJECT" in os.environ:  # transformers documents this name, but SwanLab fails at it
        os.environ["SWANLAB_PROJ_NAME"] = os.environ.pop("SWANLAB_PROJECT")
    usable = {}
    for name in args.report_to:
        check_mode(name)
        check_project(name, args)
        make_directory(*directory_of(name, args), shared=shared)
        if args.process_index == 0:
            with warn_on_failure(name):
                INTEGRATION_TO_CALLBACK[name]()  # raises an error that says which package is missing
                usable[name] = choose_mode(name, args) if name in MODES else ""
    return usable


@contextmanager
def warn_on_failure(name: str) -> Iterator[None]:
    """Turns any failure of a tracker at start-up into a warning."""
    try:
        yield
    except Exception as error:  # trackers raise errors of many kinds, and none may keep a run from training
        logger.warning("--report_to %s: it can't start, going on without it: %s", name, error)


def check_mode(name: str) -> None:
    """Checks the mode that the environment chooses for a tracker.

    Raises:
        UserError: the tracker doesn't know it.
    """
    variable, modes = MODES.get(name, ("", ()))
    mode = os.environ.get(variable)
    if mode and mode not in modes:
        raise UserError(f"{variable} is {mode}; it must be one of {', '.join(modes)}")


def check_project(name: str, args: TrainingArguments) -> None:
    """Checks the project name for a tracker, which would refuse it only after the data are prepared.

    Raises:
        UserError: the tracker doesn't accept it.
    """
    if name not in PROJECT_NAMES:
        return
    _, pattern, rule = PROJECT_NAMES[name]
    project, setting = project_of(name, args)
    if not re.fullmatch(pattern, project):
        raise UserError(f"{setting} is {project!r}; {name} takes {rule}")


def project_of(name: str, args: TrainingArguments) -> tuple[str, str]:
    """The project name for SwanLab or WandB, and the setting that it comes from."""
    variable, *_ = PROJECT_NAMES[name]
    project = os.environ.get(variable)
    return (project, variable) if project else (args.project, "--project")


def directory_of(name: str, args: TrainingArguments) -> tuple[str, str]:
    """The directory that a tracker writes to, and the setting that it comes from."""
    settings = {
        "swanlab": ("SWANLAB_LOG_DIR", os.path.join(args.output_dir, "swanlog")),
        "wandb": ("WANDB_DIR", args.output_dir),
        "tensorboard": ("TENSORBOARD_LOGGING_DIR", os.path.join(args.output_dir, "runs")),
    }
    variable, default = settings.get(name, ("", args.output_dir))
    return os.environ.get(variable, default), variable if variable in os.environ else "--output_dir"


def choose_mode(name: str, args: TrainingArguments) -> str:
    """Chooses the mode of SwanLab or WandB: what the environment says, but offline if its server can't be used.

    Raises:
        ImportError: SwanLab's local mode needs a package that is not installed.
    """
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
            name,
            reason,
            where,
            name,
            shlex.quote(where),
            runs,
        )
    return "offline" if reason else mode


def why_not_online(name: str) -> str:
    """Logs in to SwanLab or WandB, and returns why that failed; "" if it didn't."""
    if name == "swanlab":
        import swanlab

        if not swanlab.Settings().api_key:  # login() would ask for one in the terminal
            return "no API key"
        login = swanlab.login
    else:
        import wandb

        login = partial(wandb.login, prompt=False)
    try:
        return "" if login() else "no API key"
    except Exception as error:  # their errors of the network, the server and the key have no class in common
        return f"its server can't be used ({error})"
