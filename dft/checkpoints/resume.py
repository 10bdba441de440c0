"""Find the checkpoint that a run is resumed from: the newest that is whole, or the one that is named."""

import json
import logging
from functools import partial
from pathlib import Path

from transformers import TrainingArguments

from dft.checkpoints.compare import check_loadable
from dft.checkpoints.integrity import REMEDY, check_complete, check_whole
from dft.checkpoints.manifest import MANIFEST, has_manifest
from dft.checkpoints.staging import clear_leftovers, list_checkpoints, step_of
from dft.distributed import once_per_node
from dft.errors import UserError
from dft.pickles import check_checkpoint

logger = logging.getLogger(__name__)


def find_checkpoint(args: TrainingArguments) -> tuple[str | None, int]:
    """The checkpoint directory to resume from, or None, and its step. All ranks must call it together.

    Raises:
        UserError: there is none, it isn't whole, it holds the model alone, or it is beyond the end of this run.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        _warn_of_earlier_run(args.output_dir)
        return None, 0
    path, step, epoch = once_per_node(partial(_choose, wanted, args))
    done, end, flag = step, args.max_steps, "max_steps"
    if end <= 0:
        done, end, flag = epoch, args.num_train_epochs, "num_train_epochs"
    if done > end:
        raise UserError(
            f"--resume_from_checkpoint {path} is at step {step} and epoch {epoch:g}, beyond --{flag} {end:g}: raise "
            "that, or name an earlier checkpoint"
        )
    if done == end:
        logger.info("Nothing is left to train: %s is at the end, step %d; its model is the final one", path, step)
    else:
        logger.info("Going on from %s, which is at step %d", path, step)
    return str(path), step


def _choose(wanted: str, args: TrainingArguments) -> tuple[Path, int, float]:
    """The checkpoint that `last` or a name stands for, with its step and epoch."""
    output_dir = Path(args.output_dir)
    if output_dir.is_dir():
        clear_leftovers(output_dir)
    if wanted.lower() in ("last", "true"):
        path = find_newest(output_dir)
        position = read_position(path)
    else:
        path = Path(wanted)
        position = check_resumable(path)
        newer = [other.name for other in list_checkpoints(path.parent) if step_of(other) > position[0]]
        if newer:
            logger.warning("%s isn't the newest: beside it is %s, which this run may replace", path, newer[0])
    if not has_manifest(path):
        logger.warning("%s has no %s: whether its files are as they were written can't be told", path, MANIFEST)
    check_loadable(path, args)
    return path, *position


def find_newest(output_dir: Path) -> Path:
    """The newest checkpoint whose manifest holds; if none does, the newest without one that seems whole.

    Newer ones that are passed over are named with the reason.

    Raises:
        UserError: there is none that a run can go on from.
    """
    found = list_checkpoints(output_dir)
    if not found:
        raise UserError(f"--resume_from_checkpoint: no checkpoint in {output_dir}; drop the flag to start anew")
    reasons = {path: f"{path}: it has no {MANIFEST}" for path in found if not has_manifest(path)}
    for path in sorted(found, key=has_manifest, reverse=True):
        try:
            check_resumable(path)
        except UserError as error:
            reasons[path] = str(error).removeprefix("--resume_from_checkpoint ").removesuffix(REMEDY)
            continue
        newer = found[: found.index(path)]
        if newer:
            logger.warning("Passed over:\n%s", "\n".join(reasons[other] for other in newer))
        return path
    listed = "\n".join(reasons[path] for path in found)
    raise UserError(f"--resume_from_checkpoint: in {output_dir}, no run can go on from any checkpoint:\n{listed}")


def check_resumable(checkpoint: Path) -> tuple[int, float]:
    """The step and the epoch that a checkpoint was saved at, from which a run can go on.

    Raises:
        UserError: it isn't whole, or would run code.
    """
    position = read_position(checkpoint)
    check_whole(checkpoint)
    check_complete(checkpoint)
    check_checkpoint(checkpoint)
    return position


def read_position(checkpoint: Path) -> tuple[int, float]:
    """The step and the epoch that a checkpoint was saved at.

    Raises:
        UserError: it has no valid trainer_state.json.
    """
    path = checkpoint / "trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return int(state.get("global_step", 0)), float(state.get("epoch") or 0.0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--resume_from_checkpoint {checkpoint}: not a whole checkpoint ({path}: {error})") from error


def _warn_of_earlier_run(output_dir: str) -> None:
    if list_checkpoints(Path(output_dir)):
        logger.warning(
            "%s holds checkpoints of an earlier run, which count towards --save_total_limit, and which "
            "--resume_from_checkpoint last would go on from, where they are further than this run's. To keep that "
            "run: another --output_dir",
            output_dir,
        )
