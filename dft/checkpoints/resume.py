"""Find the checkpoint that a run is resumed from."""

import json
import logging
from functools import partial
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dft.checkpoints.integrity import check_complete, check_whole
from dft.distributed import once_per_node
from dft.errors import UserError
from dft.pickles import check_checkpoint

logger = logging.getLogger(__name__)


def find_checkpoint(args: TrainingArguments) -> tuple[str | None, int]:
    """The checkpoint directory to resume from, or None, and its step. All ranks must call it together.

    Raises:
        UserError: there is none, it isn't whole, it holds the model alone, or nothing is left to train.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        _warn_of_earlier_run(args.output_dir)
        return None, 0
    if wanted.lower() in ("last", "true"):
        wanted = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if wanted is None:
            raise UserError(
                f"--resume_from_checkpoint: no checkpoint in {args.output_dir}; drop the flag to start anew"
            )
    path = Path(wanted)
    step, epoch = read_position(path)
    check_complete(path)
    once_per_node(partial(check_whole, path))
    once_per_node(partial(check_checkpoint, path))
    # Trainer would train one step more, or none and write empty results
    if step >= args.max_steps if args.max_steps > 0 else epoch >= args.num_train_epochs:
        raise UserError(
            f"--resume_from_checkpoint {path}: nothing is left to train, it is at step {step} and epoch {epoch:g}; "
            "raise --max_steps or --num_train_epochs"
        )
    logger.info("Going on from %s, which is at step %d", path, step)
    return str(path), step


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
    if Path(output_dir).is_dir() and get_last_checkpoint(output_dir):
        logger.warning(
            "%s holds checkpoints of an earlier run, which count towards --save_total_limit, and which "
            "--resume_from_checkpoint last would go on from, where they are further than this run's. To keep that "
            "run: another --output_dir",
            output_dir,
        )
