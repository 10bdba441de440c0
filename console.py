"""What a run says of itself while it trains, where there is no terminal for a progress bar."""

import time
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

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


def record_line(logs: dict[str, Any], step: int, max_steps: int, seconds_left: float | None = None) -> str | None:
    """A log record as one line; None for a record of another kind than training and evaluation.

    Args:
        seconds_left: until the last step.
    """
    place = f"step {step}/{max_steps}"
    if "learning_rate" in logs:
        parts = [f"{name} {logs[key]:{form}}" for key, (name, form) in FIELDS.items() if key in logs]
        if seconds_left is not None:
            minutes, seconds = divmod(round(seconds_left), 60)
            parts.append(f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}")
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
        done = state.global_step - self._first_step
        per_step = (time.monotonic() - self._start) / done if done else None
        left = None if per_step is None else per_step * (state.max_steps - state.global_step)
        line = record_line(logs or {}, state.global_step, state.max_steps, left)
        if line is not None and state.is_world_process_zero:
            print(line, flush=True)


def print_lines(trainer: Trainer) -> None:
    """Puts ConsoleLog in the place of the callback that prints records as dictionaries, if there is one."""
    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(ConsoleLog())
