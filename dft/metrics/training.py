"""The metrics of training records: DFT metrics, throughput, memory and MFU since the last record; totals of a run."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from dft.metrics.advice import advice_on_ratios, advice_on_weights
from dft.metrics.throughput import ModelFlops, peak_memory_gib
from dft.metrics.token_sums import TokenSums, averages, channel_averages, health

logger = logging.getLogger(__name__)


class LogLastStepCallback(TrainerCallback):
    """Has the last step logged too, which may not be a multiple of logging_steps."""

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a record after the last step."""
        if args.logging_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_log = True


class TrainingMetrics:
    """Turns the sums over what was trained on, and the time that it took, into log records.

    Args:
        channels: names of the channels, in the order of their numbers.
        with_entropy: whether token statistics have the entropy.
        with_ratio: whether the objective clips ratios to the starting weights.
        objective: its name, for warnings.
        min_steps: DFT metrics are added only to records at least this many steps apart, and to the last; None for all.
        flops, peak_tflops: the operations of training and one device's peak, for mfu; without either there is no mfu.

    Attributes:
        sums: over what was trained on since the last record, to be added to after every micro-batch.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        channels: Sequence[str] = (),
        with_entropy: bool = False,
        with_ratio: bool = False,
        objective: str = "dft",
        min_steps: int | None = None,
        flops: ModelFlops | None = None,
        peak_tflops: float | None = None,
    ):
        self.sums = TokenSums(device, len(channels))
        self._device = device
        self._channels = channels
        self._with_entropy, self._with_ratio = with_entropy, with_ratio
        self._objective = objective
        self._min_steps = min_steps or 1
        self._flops = flops
        self._peak_tflops = peak_tflops
        self._unrecorded = [0.0] * len(self.sums.values)  # sums since the DFT metrics were last recorded
        self._recorded_step = 0  # step at which they were
        self._advised: set[Callable] = set()  # what was warned of, once
        # start of the time that the next record divides by, moved on by pauses; None before the first step
        self._clock: float | None = None
        self._paused_at: float | None = None
        self._first_step = 0
        self._tokens = self._supervised = self._seconds = 0.0  # totals of the training

    def start(self, step: int) -> None:
        """Starts the clock before the first step, which follows `step`; does nothing when it runs already.

        Called with the first batch rather than when training is set up, because loading and compiling take long.
        """
        if self._clock is None:
            self._clock = time.perf_counter()
            self._recorded_step = self._first_step = step

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Stops the clock for what is not training, such as evaluations and saves.

        A record may be made inside, and ends the time of training there: only what comes after it is left out.
        """
        self._paused_at = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - self._paused_at
        self._paused_at = None

    def record(self, accelerator, step: int, alpha: float, is_last: bool = False) -> dict[str, float]:
        """Makes the record of what was trained on since the last one. All ranks must call it together.

        Its keys are documented at DFTTrainer. One reduction of all sums is its only communication.

        Args:
            step: number of steps done.
            alpha: of the last of these steps.
            is_last: whether the training ends here; then the DFT metrics are added, however recent the last ones are.
        """
        sums, seconds = self._take(accelerator)
        record = {"loss": averages(sums)["loss"]}
        self._unrecorded = [a + b for a, b in zip(self._unrecorded, sums, strict=True)]
        if step - self._recorded_step >= self._min_steps or is_last:
            record |= self._dft_metrics(alpha)
            self._advise()
            self._unrecorded = [0.0] * len(sums)
            self._recorded_step = step
        record["tokens_per_second"] = sums[TokenSums.TOKENS] / seconds
        record["supervised_tokens_per_second"] = sums[TokenSums.SUPERVISED] / seconds
        record["padding_share"] = 1.0 - sums[TokenSums.TOKENS] / max(sums[TokenSums.POSITIONS], 1.0)
        record["memory_gib"] = peak_memory_gib(self._device)
        if self._flops is not None and self._peak_tflops is not None:
            flops = self._flops(sums[TokenSums.TOKENS], sums[TokenSums.SUPERVISED], sums[TokenSums.PAIRS])
            record["mfu"] = flops / (seconds * self._peak_tflops * 1e12 * accelerator.num_processes)
        return record

    def totals(self, accelerator, step: int) -> dict[str, float]:
        """Sums up the whole training, which ends with `step`. All ranks must call it together.

        Speeds are those of training alone, without evaluations and saves.
        """
        self._take(accelerator)
        seconds = max(self._seconds, 1e-9)
        return {
            "train_steps": step - self._first_step,
            "train_tokens": self._tokens,
            "train_supervised_tokens": self._supervised,
            "train_tokens_per_second": self._tokens / seconds,
            "train_supervised_tokens_per_second": self._supervised / seconds,
        }

    def _take(self, accelerator) -> tuple[list[float], float]:
        """Returns the sums over all ranks and the seconds since the last record, and starts anew."""
        # taken before the time is, because it waits for the device, whose unfinished work is training
        sums = self.sums.take(accelerator)
        now = time.perf_counter()
        if self._paused_at is not None:
            self._paused_at = now
        seconds = max(now - (now if self._clock is None else self._clock), 1e-9)
        self._clock = now
        self._tokens += sums[TokenSums.TOKENS]
        self._supervised += sums[TokenSums.SUPERVISED]
        self._seconds += seconds
        return sums, seconds

    def _dft_metrics(self, alpha: float) -> dict[str, float]:
        """The metrics that log_metrics_steps thins out."""
        means = averages(self._unrecorded)
        return {
            "ce_loss": means["ce_loss"],
            "train/avg_p_correct": means["avg_p_correct"],
            "train/dft_alpha": alpha,
            "token_accuracy": means["acc"],
            **health(self._unrecorded, self._with_entropy, self._with_ratio),
            **channel_averages(self._unrecorded, self._channels),
        }

    def _advise(self) -> None:
        """Warns once of each: most tokens of a record have next to no weight, and many ratios are clipped."""
        for advice in (advice_on_weights, advice_on_ratios):
            text = advice(self._objective, self._unrecorded)
            if text is not None and advice not in self._advised:
                self._advised.add(advice)
                logger.warning("%s", text)
