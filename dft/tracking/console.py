"""What a run says of itself: a line for each record, a progress bar in a terminal, and a summary at the end."""

import shlex
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dft.tracking.curves import holds_best, series

FIELDS = {  # of a record: its key, what it is called, and how it is written
    "loss": ("loss", ".4f"),
    "ce_loss": ("CE", ".4f"),
    "train/avg_p_correct": ("p", ".4f"),
    "token_accuracy": ("acc", ".4f"),
    "learning_rate": ("lr", ".2e"),
    "grad_norm": ("grad", ".3g"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "mfu": ("MFU", ".1%"),
    "memory_gib": ("GiB", ".2f"),
}
EVALUATION_FIELDS = {
    "loss": ("loss", ".4f"),
    "ce_loss": ("CE", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "avg_p_correct": ("p", ".4f"),
    "acc": ("acc", ".4f"),
    "runtime": ("seconds", ".1f"),
}


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def record_line(logs: dict[str, Any], step: int, max_steps: int, seconds_left: float | None = None) -> str | None:
    """A log record as one line; None for a record of another kind than training and evaluation.

    Args:
        seconds_left: until the last step.
    """
    place = f"step {step}/{max_steps}"
    if "learning_rate" in logs:
        parts = [f"{name} {logs[key]:{form}}" for key, (name, form) in FIELDS.items() if key in logs]
        if seconds_left is not None:
            parts.append(f"left {clock(seconds_left)}")
        return "  ".join([place, *parts])
    prefix = next((key.removesuffix("ce_loss") for key in logs if key.endswith("_ce_loss")), None)
    if prefix is None:
        return None
    named = [(prefix + key, name, form) for key, (name, form) in EVALUATION_FIELDS.items()]
    parts = [f"{name} {logs[key]:{form}}" for key, name, form in named if key in logs]
    return "  ".join([place, prefix.rstrip("_"), *parts])


class ConsoleLog(TrainerCallback):
    """Prints a line for each record, with the time that is left."""

    def __init__(self):
        self._start, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints the record on rank 0; the seconds left are those of the steps to come at the mean speed so far."""
        done = state.global_step - self._first_step
        per_step = (time.monotonic() - self._start) / done if done else None
        left = None if per_step is None else per_step * (state.max_steps - state.global_step)
        line = record_line(logs or {}, state.global_step, state.max_steps, left)
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)


class ProgressLine(ProgressCallback):
    """Trainer's progress bar, with a line for each record above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes the record on rank 0, while there is a bar; that tells the time left itself."""
        line = record_line(logs or {}, state.global_step, state.max_steps)
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


def print_lines(trainer: Trainer) -> None:
    """Has records printed as lines, with a progress bar or without, where Trainer prints dictionaries."""
    for theirs, ours in ((PrinterCallback, ConsoleLog), (ProgressCallback, ProgressLine)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())


def summary(trainer: Trainer) -> str:
    """What a run achieved and where it left things, in a few lines."""
    history, state, out = trainer.state.log_history, trainer.state, Path(trainer.args.output_dir)
    totals = next(record for record in reversed(history) if "train_runtime" in record)
    done = f"{state.global_step} steps"
    if totals["train_steps"] < state.global_step:
        done += f", {totals['train_steps']} of them since the run was resumed,"
    lines = [
        f"Done: {done} in {clock(totals['train_runtime'])}, {totals['train_tokens']:,.0f} tokens, "
        f"{totals['train_tokens_per_second']:,.0f} tokens/s without evaluations and saves"
    ]
    for name, key in (
        ("training cross-entropy", "ce_loss"),
        ("training p_correct", "train/avg_p_correct"),
        ("evaluation cross-entropy", "eval_ce_loss"),
        ("evaluation accuracy", "eval_acc"),
    ):
        steps, values = series(history, key)
        if steps:
            first = f"{values[0]:.4f} at step {steps[0]} -> " if len(steps) > 1 else ""
            lines.append(f"  {name:<25} {first}{values[-1]:.4f} at step {steps[-1]}")
    if state.best_model_checkpoint:
        metric = f"{trainer.args.metric_for_best_model} {state.best_metric:.4f}"
        lines.append(f"  best checkpoint           {state.best_model_checkpoint} ({metric})")
    weights = f" (weights of step {state.best_global_step})" if holds_best(trainer.args, state) else ""
    lines += [
        f"  model                     {out}{weights}",
        f"  curves                    {out / 'training_curves.png'}",
        f"  all numbers               {out / 'train_log.jsonl'}",
        f"  talk to it                python scripts/chat.py {shlex.quote(str(out))}",
        f"  evaluate it               python scripts/evaluate.py {shlex.quote(str(out))} --data_files FILE",
    ]
    return "\n".join(lines)
