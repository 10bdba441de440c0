"""At a loss or a gradient that is NaN or infinite, the run ends before the update, or goes on without it."""

import logging
import math
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from dft.checkpoints.finite_weights import check_finite
from dft.config.training import DFTTrainingArguments

logger = logging.getLogger(__name__)

REMEDY = "Go on from the last checkpoint with a lower --learning_rate, more --warmup_steps, or other data"
# In float16 the loss is multiplied by 2**16 at first, and by half as much after each overflow, which is therefore
# nothing unusual. After so many in a row, scaling is not what is wrong.
MAX_OVERFLOWS = 40


class NonfiniteSteps:
    """Ends a run at a step whose loss or gradient is NaN or infinite, or has it go on without the update of that step.

    All ranks call it together and with the same values, so that they end, or go on, together.

    Args:
        skips: the run goes on, until there are `most` such steps in a row.
        most: at least 1.
        scales_loss: the training is in float16, whose loss scaling skips updates itself.
    """

    def __init__(self, skips: bool = False, most: int = 1, scales_loss: bool = False):
        self._skips, self._scales_loss = skips, scales_loss
        self._most = max(most, MAX_OVERFLOWS) if scales_loss else most
        self._has_bad_loss = False  # in this step
        self._in_row = 0
        self._not_recorded = 0

    def take_bad_loss(self, text: str, remedy: str) -> None:
        """Takes in that the loss of this step is not finite.

        Raises:
            FloatingPointError: no update is to be skipped.
        """
        if not self._skips:
            raise FloatingPointError(f"{text} {remedy}")
        logger.warning("%s Its update is skipped", text)
        self._has_bad_loss = True

    def end_step(self, step: int, norm: float) -> bool:
        """Whether the update of a step must be skipped, other than by the loss scaling.

        Args:
            step: counted from 1.
            norm: of the gradient.

        Raises:
            FloatingPointError: the run must end.
        """
        has_bad_loss, self._has_bad_loss = self._has_bad_loss, False
        if not has_bad_loss and 0 <= norm < math.inf:  # DeepSpeed has -1 for one that is not finite
            self._in_row = 0
            return False
        self._in_row += 1
        self._not_recorded += 1
        text = f"the norm of the gradient is {norm:g} in step {step}."
        if not self._skips and not self._scales_loss:
            raise FloatingPointError(
                f"{text} Nothing of this step is saved. {REMEDY}; --on_nonfinite skip goes on without such updates"
            )
        if not has_bad_loss and not self._scales_loss:
            logger.warning("%s Its update is skipped", text)
        if self._in_row >= self._most:
            raise FloatingPointError(
                f"the loss or the gradient was NaN or infinite in {self._in_row} steps in a row, the last of them "
                f"step {step}. {REMEDY}" + ("; or train in bfloat16 instead of float16" if self._scales_loss else "")
            )
        return not self._scales_loss

    def take_record(self) -> dict[str, float]:
        """What the log says of the steps since the last call: nothing, where none was skipped and none may be."""
        count, self._not_recorded = self._not_recorded, 0
        return {"train/nonfinite_steps": count} if count or self._skips else {}


class FiniteTrainer(Trainer):
    """Trainer that makes no update with a gradient that is NaN or infinite. Without more, it ends the training then.

    Attributes:
        nonfinite: decides what happens; the loss is to be told to it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = {}
        if isinstance(self.args, DFTTrainingArguments):
            settings = {"skips": self.args.on_nonfinite == "skip", "most": self.args.max_nonfinite_steps}
        self.nonfinite = NonfiniteSteps(**settings, scales_loss=self.accelerator.mixed_precision == "fp16")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Trainer's, which it asks for before the update; one that is not finite prevents that.

        All ranks have the same norm. DeepSpeed has looked at it and made or refused the update before this is called.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        step = self.state.global_step + 1
        if not self.is_deepspeed_enabled:
            is_skipped = self.nonfinite.end_step(step, float(norm))
            if self.accelerator.scaler is None:
                self._skip_update(is_skipped)
            return norm
        is_refused = self.accelerator.optimizer_step_was_skipped
        if norm is None and not is_refused:  # some of its configurations find no norm
            check_finite(self.model, step)
        if self.nonfinite.end_step(step, math.inf if is_refused else norm or 0.0) and not is_refused:
            raise FloatingPointError(f"DeepSpeed has made the update of step {step} with a gradient that isn't finite")
        return norm

    def _skip_update(self, is_skipped: bool) -> None:
        """Has accelerate skip the next update, and Trainer leave the schedule, as after an overflow in float16.

        Trainer says at each micro-batch whether an update is due, and drops the gradients after it.
        """
        self.optimizer._is_overflow = is_skipped
        if is_skipped:
            self.accelerator.gradient_state.sync_gradients = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the steps whose update was skipped since the last training record."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.nonfinite.take_record())
        super().log(logs, start_time)
