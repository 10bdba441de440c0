"""What a training record says: the sums since the last one, the clock, and the totals of a run."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

from dft.metrics.throughput import ModelFlops, peak_memory_gib
from dft.metrics.token_sums import UNLIKELY, TokenSums, averages, channel_averages, health

logger = logging.getLogger(__name__)


class LastRecord(TrainerCallback):
    """Logs the last step too, which logging every so many steps may leave out."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.logging_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_log = True


class TrainingMetrics:
    """The metrics of one training.

    Args:
        channels: names of the sources of tokens.
        with_entropy: the statistics of tokens have it.
        min_steps: DFT metrics are added only to records at least this many steps apart, and to the last; None for all.
        flops, peak_tflops: what training needs, and what one device could do at most, for mfu.

    Attributes:
        sums: of what was trained on since the last record.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        channels: Sequence[str] = (),
        with_entropy: bool = False,
        min_steps: int | None = None,
        flops: ModelFlops | None = None,
        peak_tflops: float | None = None,
    ):
        self.sums = TokenSums(device, len(channels))
        self._device = device
        self._channels = channels
        self._with_entropy = with_entropy
        self._min_steps = min_steps or 1
        self._flops = flops
        self._peak_tflops = peak_tflops
        self._unshown = [0.0] * len(self.sums.values)  # sums since the DFT metrics were last recorded
        self._shown_step = 0  # when that was
        self._has_warned = False  # that hardly anything is learnt
        self._clock: float | None = None  # when the last record was made; None before the first step
        self._paused_at: float | None = None
        self._first_step = 0
        self._tokens = self._supervised = self._seconds = 0.0  # of the whole training

    def start(self, step: int) -> None:
        """Starts the clock, if it doesn't go yet, before the step that follows `step`."""
        if self._clock is None:
            self._clock = time.perf_counter()
            self._shown_step = self._first_step = step

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Around what is not training, such as evaluations and saves; of a record, what comes after it."""
        self._paused_at = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - self._paused_at
        self._paused_at = None

    def record(self, accelerator, step: int, alpha: float, is_last: bool = False) -> dict[str, float]:
        """What was trained on since the last record. A collective, the only one of a record.

        Args:
            step: steps done.
            alpha: in force at the last of them.
            is_last: of the training; has the DFT metrics whenever they were recorded before.
        """
        sums, seconds = self._take(accelerator)
        record = {"loss": averages(sums)["loss"]}
        self._unshown = [a + b for a, b in zip(self._unshown, sums, strict=True)]
        if step - self._shown_step >= self._min_steps or is_last:
            record |= self._dft_metrics(alpha)
            self._warn_if_hardly_anything_is_learnt()
            self._unshown = [0.0] * len(sums)
            self._shown_step = step
        record["tokens_per_second"] = sums[TokenSums.TOKENS] / seconds
        record["supervised_tokens_per_second"] = sums[TokenSums.SUPERVISED] / seconds
        record["padding_share"] = 1.0 - sums[TokenSums.TOKENS] / max(sums[TokenSums.POSITIONS], 1.0)
        record["memory_gib"] = peak_memory_gib(self._device)
        if self._flops is not None and self._peak_tflops is not None:
            done = self._flops(*(sums[i] for i in (TokenSums.TOKENS, TokenSums.SUPERVISED, TokenSums.PAIRS)))
            record["mfu"] = done / (seconds * self._peak_tflops * 1e12 * accelerator.num_processes)
        return record

    def totals(self, accelerator, step: int) -> dict[str, float]:
        """What the whole training, which ends with `step`, went through. A collective."""
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
        """The sums over all ranks, and the seconds, since the last record."""
        sums = self.sums.take(accelerator)  # waits for the device: what it still had to do was training
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
        shown = averages(self._unshown)
        return {
            "ce_loss": shown["ce_loss"],
            "train/avg_p_correct": shown["avg_p_correct"],
            "train/dft_alpha": alpha,
            "token_accuracy": shown["acc"],
            **health(self._unshown, self._with_entropy),
            **channel_averages(self._unshown, self._channels),
        }

    def _warn_if_hardly_anything_is_learnt(self) -> None:
        """Warns once if most tokens of a record have next to no weight, and so next to no gradient."""
        share = self._unshown[TokenSums.WEIGHT_BELOW] / max(self._unshown[TokenSums.SUPERVISED], 1.0)
        if share > 0.5 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%.0f%% of the supervised tokens have a DFT weight below %g: the model hardly expects them, so it "
                "hardly learns them. Lower dft_alpha (0.7), set a dft_floor (0.1), let alpha rise "
                "(dft_alpha_warmup_ratio), or train with dft_alpha 0 first",
                *(100 * share, UNLIKELY),
            )
