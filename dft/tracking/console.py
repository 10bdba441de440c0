"""Console output: a line for each log record, a progress bar in a terminal, and a summary at the end."""

import shlex
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dft.printable import printable
from dft.tracking.curves import CURVES_FILE, final_weights_are_best, series

TRAINING_FIELDS = {  # key of a training record: (name on the console, number format)
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
EVALUATION_FIELDS = {  # key of an evaluation record without its prefix: (name, number format)
    "loss": ("loss", ".4f"),
    "ce_loss": ("CE", ".4f"),
    "perplexity": ("perplexity", ".3f"),
    "avg_p_correct": ("p", ".4f"),
    "acc": ("acc", ".4f"),
    "answers/score": ("answers", ".4f"),
    "runtime": ("seconds", ".1f"),
}


def format_duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def record_line(logs: dict[str, Any], step: int, max_steps: int, seconds_left: float | None = None) -> str | None:
    """Formats a log record as one line; None if it is a record of neither training nor evaluation.

    Args:
        logs: the record, by key.
        seconds_left: estimated time to the last step.
    """
    progress = f"step {step}/{max_steps}"
    if "learning_rate" in logs:
        parts = [f"{name} {logs[key]:{form}}" for key, (name, form) in TRAINING_FIELDS.items() if key in logs]
        if seconds_left is not None:
            parts.append(f"left {format_duration(seconds_left)}")
        return "  ".join([progress, *parts])
    prefix = next((key.removesuffix("ce_loss") for key in logs if key.endswith("_ce_loss")), None)
    if prefix is None:
        return None
    fields = [(prefix + key, name, form) for key, (name, form) in EVALUATION_FIELDS.items()]
    parts = [f"{name} {logs[key]:{form}}" for key, name, form in fields if key in logs]
    return "  ".join([progress, prefix.rstrip("_"), *parts])


class ConsoleLog(TrainerCallback):
    """Prints a line for each record, with an estimate of the time left; used without a progress bar."""

    def __init__(self):
        self._start, self._first_step = time.monotonic(), 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the time that the estimate is based on, at the step that a resumed run starts with."""
        self._start, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints the record on rank 0, expecting the steps left to take as long as those so far on average."""
        done = state.global_step - self._first_step
        per_step = (time.monotonic() - self._start) / done if done else None
        left = None if per_step is None else per_step * (state.max_steps - state.global_step)
        line = record_line(logs or {}, state.global_step, state.max_steps, left)
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)


class ProgressLine(ProgressCallback):
    """Trainer's progress bar, with a line for each record above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes the record on rank 0 while a bar is shown; the bar itself tells the time left."""
        line = record_line(logs or {}, state.global_step, state.max_steps)
        if line is not None and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)


def print_lines(trainer: Trainer) -> None:
    """Replaces Trainer's console output, which prints records as dictionaries, by a line for each record."""
    for theirs, ours in ((PrinterCallback, ConsoleLog), (ProgressCallback, ProgressLine)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours())


def summary(trainer: Trainer) -> str:
    """Summarizes a finished training in a few lines: what was done, with what result, and where its files are."""
    history, state, out = trainer.state.log_history, trainer.state, Path(printable(trainer.args.output_dir))
    totals = next(record for record in reversed(history) if "train_runtime" in record)
    done = f"{state.global_step} steps"
    if totals["train_steps"] < state.global_step:
        done += f", {totals['train_steps']} of them since the run was resumed,"
    weights = f" (weights of step {state.best_global_step})" if final_weights_are_best(trainer.args, state) else ""
    lines = [
        f"Done: {done} in {format_duration(totals['train_runtime'])}, {totals['train_tokens']:,.0f} tokens, "
        f"{totals['train_tokens_per_second']:,.0f} tokens/s without evaluations and saves",
        *_result_lines(trainer),
        f"  model                     {out}{weights}",
        f"  curves                    {out / CURVES_FILE}",
        f"  all numbers               {out / 'train_log.jsonl'}",
        f"  talk to it                python scripts/chat.py {shlex.quote(str(out))}",
        f"  evaluate it               python scripts/evaluate.py {shlex.quote(str(out))} --data_files FILE",
    ]
    return printable("\n".join(lines), lines=True)


def _result_lines(trainer: Trainer) -> list[str]:
    """The first and last value of the main metrics, and the best checkpoint."""
    state, lines = trainer.state, []
    for name, key in (
        ("training cross-entropy", "ce_loss"),
        ("training p_correct", "train/avg_p_correct"),
        ("evaluation cross-entropy", "eval_ce_loss"),
        ("evaluation accuracy", "eval_acc"),
        ("right answers", "eval_answers/score"),
    ):
        steps, values = series(state.log_history, key)
        if steps:
            first = f"{values[0]:.4f} at step {steps[0]} -> " if len(steps) > 1 else ""
            lines.append(f"  {name:<25} {first}{values[-1]:.4f} at step {steps[-1]}")
    if state.best_model_checkpoint:
        metric = f"{trainer.args.metric_for_best_model} {state.best_metric:.4f}"
        lines.append(f"  best checkpoint           {printable(state.best_model_checkpoint)} ({metric})")
    return lines
