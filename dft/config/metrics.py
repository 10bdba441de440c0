"""Settings of the metrics and of the log."""

import math
from dataclasses import dataclass

from dft.config.options import option
from dft.errors import UserError


@dataclass(frozen=True)
class MetricsConfig:
    """What is recorded, how often, and which ranks speak.

    Raises:
        UserError: a value outside its range.
    """

    _argument_group_name = "logging"

    reduce_logging: bool = option("Only rank 0 speaks, but for errors. False: every rank speaks.", True)
    log_metrics_steps: int | None = option(
        "Add the DFT metrics (ce_loss, p_correct, accuracy) only to records at least this many steps apart; "
        "by default to every record (--logging_steps)."
    )
    log_entropy: bool = option("Add the entropy of the model's predictions, which costs a little time.", False)
    peak_tflops: float | None = option(
        "What one GPU could do at most in 16 bits, in TFLOP/s, for the metric mfu; known for common GPUs."
    )

    def __post_init__(self):
        if self.log_metrics_steps is not None and self.log_metrics_steps < 1:
            raise UserError(f"--log_metrics_steps is {self.log_metrics_steps}; it must be at least 1")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"--peak_tflops is {self.peak_tflops}; it must be above 0")
