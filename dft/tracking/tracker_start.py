"""Start the trackers with a run's metadata, and resume their earlier runs."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import default_logdir

from dft.printable import printable
from dft.tracking.tracker_checks import directory_of, project_of, warn_on_failure

logger = logging.getLogger(__name__)


def start_trackers(
    args: TrainingArguments, modes: dict[str, str], about: dict[str, Any], steps_done: int = 0
) -> list[str]:
    """Starts the trackers on rank 0; a resumed run continues in each where it stopped.

    Args:
        modes: of the usable trackers, see tracker_checks.check_trackers.
        about: metadata that trackers record with the run, see run_info.about_run.
        steps_done: steps of the run that is resumed; 0 for a new run.

    Returns:
        The trackers that started, to report to; none on other ranks.
    """
    if args.process_index != 0:
        return []
    ids = TrackerIds(args.output_dir, steps_done)
    started = []
    for name, mode in modes.items():
        start = {"swanlab": start_swanlab, "wandb": start_wandb, "tensorboard": start_tensorboard}.get(name)
        with warn_on_failure(name):
            if start is not None:  # transformers starts the others
                start(args, mode, about, ids)
            started.append(name)
    return started


class TrackerIds:
    """The ids that trackers gave to a run, saved in its output directory so that a resumed run finds them.

    A new run forgets those of an earlier one.

    Attributes:
        steps_done: steps of the run that is resumed; 0 for a new one.
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
        """The id that a tracker gave to the run that is resumed; None if there is none."""
        return self._ids.get(tracker)

    def resume_arguments(self, tracker: str) -> dict[str, str]:
        """Arguments by which SwanLab's and WandB's init() continue the earlier run; none if there is none."""
        return {"id": self._ids[tracker], "resume": "allow"} if tracker in self._ids else {}

    def save(self, tracker: str, run_id: str) -> None:
        """Saves the id that a tracker gave to this run."""
        self._ids[tracker] = run_id
        self._path.write_text(json.dumps(self._ids) + "\n", encoding="utf-8")


def name_of(args: TrainingArguments) -> str | None:
    """--run_name, as trackers may print it."""
    return None if args.run_name is None else printable(args.run_name)


def start_swanlab(args: TrainingArguments, mode: str, about: dict[str, Any], ids: TrackerIds) -> None:
    """Starts SwanLab's run, because transformers' callback fails if there is none yet.

    SWANLAB_LOG_DIR and SWANLAB_PROJ_NAME are respected.
    """
    import swanlab

    if mode == "local":  # its page shows a nested setting as [object Object]
        about = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in about.items()}
    settings = {"project": project_of("swanlab", args)[0], "name": name_of(args), "mode": mode, "config": about}
    run = swanlab.init(log_dir=directory_of("swanlab", args)[0], **settings, **ids.resume_arguments("swanlab"))
    ids.save("swanlab", run.id)


def start_wandb(args: TrainingArguments, mode: str, about: dict[str, Any], ids: TrackerIds) -> None:
    """Starts WandB's run, which transformers' callback then logs to. WANDB_DIR and WANDB_PROJECT are respected."""
    import wandb

    settings = {"project": project_of("wandb", args)[0], "name": name_of(args), "mode": mode, "config": about}
    run = wandb.init(dir=directory_of("wandb", args)[0], **settings, **ids.resume_arguments("wandb"))
    ids.save("wandb", run.id)


def start_tensorboard(args: TrainingArguments, mode: str, about: dict[str, Any], ids: TrackerIds) -> None:
    """Chooses TensorBoard's directory for this run, by whose name it lists the run, and writes the metadata there.

    The directory is made in TENSORBOARD_LOGGING_DIR, which from then on names the new directory, because transformers'
    callback reads it. A new run whose name is taken gets the time added, because two runs in one directory would mix
    their curves.
    """
    from torch.utils.tensorboard import SummaryWriter

    earlier, now = ids.earlier("tensorboard"), Path(default_logdir()).name
    runs, name = Path(directory_of("tensorboard", args)[0]), earlier or (name_of(args) or now).replace(os.sep, "_")
    if not name.strip("."):  # "." and ".." would be other directories
        name = now
    if earlier is None and (runs / name).exists():
        name = f"{name}_{now}"
    # purge_step drops what an interrupted run recorded after its last checkpoint, because it is recorded anew
    with SummaryWriter(str(runs / name), purge_step=ids.steps_done + 1 if ids.steps_done else None) as writer:
        writer.add_text("run", f"```\n{json.dumps(about, indent=1, ensure_ascii=False)}\n```", ids.steps_done)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(runs / name)
    ids.save("tensorboard", name)
