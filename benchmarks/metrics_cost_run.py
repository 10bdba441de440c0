"""What one trainer's metrics cost, measured; started by metrics_cost.py. Prints a line of JSON.

    {"step": seconds, "loss": seconds of compute_loss outside the model's forward, "record": seconds of a log record,
     "drawing": seconds of the curves, "with", "without": seconds of steps with and without metrics, in turns}

Medians over the steps, the first two of which are not measured; "with" and "without" hold all steps. Every step trains
on the same rows and logs a record.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from benchmarks.train_step_run import SIZES, arguments_of, make_model, make_rows, make_tokenizer
from dft.batching.collators import PaddingCollator
from dft.config.training import DFTTrainingArguments
from dft.metrics.token_sums import TokenSums
from dft.metrics.training import TrainingMetrics
from dft.tracking.console import ConsoleLog
from dft.tracking.curves import plot_curves
from dft.tracking.train_log import TrainLog
from dft_trainer import DFTTrainer

SKIPPED = 2  # steps
CHANNELS = 4
POINTS = 200  # records in the drawing


class Stopwatch:
    """How long each call of a function took."""

    def __init__(self, function: Callable):
        update_wrapper(self, function)  # Trainer looks at the signature of forward
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wait()
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            wait()
            self.seconds.append(time.perf_counter() - start)


def wait() -> None:
    """For the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Steps(TrainerCallback):
    """When each step began: a step ends, with its record, where the next begins."""

    def __init__(self):
        self.begins: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        wait()
        self.begins.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.begins, self.begins[1:], strict=False)][SKIPPED:]


class TakingTurns(TrainerCallback):
    """Switches metrics and records off in every other step."""

    def __init__(self):
        self.is_on = True
        for owner, name, instead in ((TokenSums, "add", None), (TrainingMetrics, "record", {"loss": 0.0})):
            setattr(owner, name, self._switched(getattr(owner, name), instead))
        for owner in (TrainLog, ConsoleLog):
            owner.on_log = self._switched(owner.on_log, None)

    def _switched(self, function: Callable, instead: Any) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs) if self.is_on else instead

        return call

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_on = not self.is_on


def make_trainer(args: argparse.Namespace, data: Dataset) -> Trainer:
    settings = arguments_of(args) | {"logging_steps": 1, "output_dir": tempfile.mkdtemp()}
    model = make_model(args.size, "sdpa", args.device)
    if args.way == "trainer":
        collator = DataCollatorForSeq2Seq(make_tokenizer())
        return Trainer(model, TrainingArguments(**settings), train_dataset=data, data_collator=collator)
    if args.way == "trl":
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(**settings, loss_type="dft", max_length=None)
        return SFTTrainer(model, config, train_dataset=data, processing_class=make_tokenizer())
    return DFTTrainer(
        model,
        DFTTrainingArguments(**settings),
        dft_alpha=1.0,
        channels=[f"source{i}" for i in range(CHANNELS)],
        log_entropy=args.way == "ours_entropy",
        train_dataset=data.add_column("channel", [i % CHANNELS for i in range(len(data))]),
        data_collator=PaddingCollator(make_tokenizer()),
        callbacks=[TrainLog(settings["output_dir"]), ConsoleLog()],
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=("ours", "ours_entropy", "ours_turns", "trainer", "trl"))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4, help="of a step, which is one micro-batch")
    args = parser.parse_args()
    args.rows_per_step = args.rows
    rows = make_rows(args.rows, SIZES[args.size]["vocab_size"])
    trainer = make_trainer(args, Dataset.from_list(rows * (args.steps + SKIPPED + 1)))
    steps = Steps()
    trainer.add_callback(steps)
    result: dict[str, Any] = {}
    if args.way == "ours_turns":
        trainer.add_callback(TakingTurns())
        trainer.train()
        result = {"without": steps.seconds[::2], "with": steps.seconds[1::2]}  # SKIPPED is even, the first is off
    else:
        loss, forward = Stopwatch(trainer.compute_loss), Stopwatch(trainer.model.forward)
        record = Stopwatch(trainer.log)
        trainer.compute_loss, trainer.log, trainer.model.forward = loss, record, forward
        trainer.train()
        outside = [a - b for a, b in zip(loss.seconds, forward.seconds, strict=True)]
        result = {
            "step": median(steps.seconds),
            "loss": median(outside[SKIPPED:]),
            "record": median(record.seconds[SKIPPED:-1]),  # the last is of the whole training
        }
    if args.way == "ours":
        records = [r for r in trainer.state.log_history if "ce_loss" in r]
        path = Path(trainer.args.output_dir) / "curves.png"
        draw = Stopwatch(plot_curves)
        for _ in range(3):
            draw([{**r, "step": i} for i in range(POINTS // len(records)) for r in records], path)
        result["drawing"] = median(draw.seconds)
    result["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(json.dumps(result))


if __name__ == "__main__":
    main()
