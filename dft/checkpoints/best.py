"""Which checkpoint is the best: among those that are there, by the evaluations of their own steps."""

import logging
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

logger = logging.getLogger(__name__)


def restore_best(state: TrainerState, args: TrainingArguments, directory: Path) -> None:
    """Finds the best checkpoint of a resumed run among those that are there, by the metric in force now.

    What the resumed checkpoint says of the best may be about weights that were never saved, a directory that was
    moved or deleted, or another metric.

    Args:
        directory: that of the resumed checkpoint.
    """
    if args.metric_for_best_model is None:
        return
    key = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    earlier = state.best_global_step
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    for record in state.log_history:
        value = record.get(key)
        if value is None or (state.best_metric is not None and not is_better(value, state.best_metric, args)):
            continue
        for place in (directory, Path(args.output_dir)):
            checkpoint = place / f"{PREFIX_CHECKPOINT_DIR}-{record['step']}"
            if checkpoint.is_dir() and value == value:  # not NaN
                state.best_metric, state.best_global_step = value, record["step"]
                state.best_model_checkpoint = str(checkpoint)
                break
    if earlier is not None and state.best_global_step != earlier:
        logger.warning(
            "The best checkpoint was that of step %d by its own account; of those that are there it is %s by %s",
            earlier,
            state.best_model_checkpoint or "none",
            key,
        )


def is_better(value: float, best: float, args: TrainingArguments) -> bool:
    """Whether a value of the metric is better than the best so far."""
    return value > best if args.greater_is_better else value < best


def tell_what_is_compared(args: TrainingArguments, state: TrainerState) -> None:
    """Says at the start where evaluations and saves don't meet, so that not every evaluation can find the best.

    It is a warning where checkpoints are deleted or the best is loaded, else an information.
    """
    evaluates, saves = args.eval_strategy, args.save_strategy
    if args.metric_for_best_model is None or evaluates == IntervalStrategy.NO:
        return
    if saves not in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
        return
    schedule = [(evaluates, state.eval_steps), (saves, state.save_steps)]
    if evaluates.value == saves.value and (
        evaluates == IntervalStrategy.EPOCH or state.eval_steps == state.save_steps
    ):
        return
    every = ["epoch" if when.value == "epoch" else f"{steps} steps" for when, steps in schedule]
    tell = logger.warning if args.save_total_limit or args.load_best_model_at_end else logger.info
    tell(
        "Evaluations come every %s and checkpoints every %s. The best checkpoint is chosen among those of steps that "
        "are evaluated as well: others are not kept for their metrics, and evaluations of other steps choose nothing. "
        "To choose among all: the same --eval_steps and --save_steps, or --save_strategy best",
        *every,
    )
