"""The temperature tau of the objective talr, which follows the cross-entropy of the rows.

tau of a step is the median, over the rows of the step before, of each row's mean cross-entropy: over all ranks and
micro-batches, so that it doesn't depend on how a batch is cut. arXiv 2509.20758 takes the median of the batch itself,
which is known only when all its micro-batches have been computed.
"""

import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from dft.loss.statistics import TokenStatistics

FILE = "temperature.json"  # in a checkpoint
LEAST = 1e-6  # of rows that are known by heart


class Temperature:
    """Takes in the rows of a step and gives the tau of the next one.

    Attributes:
        tau: of the step that is next or under way.
    """

    def __init__(self, start: float):
        self.tau = start
        self._means: list[Tensor] = []

    def add(
        self,
        tokens: TokenStatistics,
        row_of_token: Tensor,
        num_rows: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Takes in a micro-batch of D rows.

        Args:
            tokens: N supervised tokens.
            row_of_token: the row that each belongs to, int64 [N].
            num_rows: D.
            group: of the ranks that have the other tokens of these rows. All of them get the same means, whose median
                is that of one rank's.
        """
        nll = tokens.nll.detach()
        sums = nll.new_zeros(2, num_rows)  # of nll, and of tokens
        sums[0].index_add_(0, row_of_token, nll)
        sums[1].index_add_(0, row_of_token, torch.ones_like(nll))
        if group is not None:
            dist.all_reduce(sums, group=group)
        self._means.append(sums[0] / sums[1])  # NaN where nothing is supervised

    def update(self, accelerator: Accelerator) -> None:
        """Ends a step. All ranks must call it together, after the same steps."""
        if not self._means:
            return
        means, self._means = torch.cat(self._means), []
        means = accelerator.gather(accelerator.pad_across_processes(means, pad_index=torch.nan))
        median = float(torch.nanquantile(means, 0.5))
        if math.isfinite(median):  # not where no row had a supervised token, or their loss was not finite
            self.tau = max(median, LEAST)

    def save(self, checkpoint: Path) -> None:
        """Writes tau to a checkpoint, which is made if it isn't there yet."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / FILE).write_text(json.dumps({"tau": self.tau}) + "\n", encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Takes tau from a checkpoint; one without it was made with another objective."""
        path = checkpoint / FILE
        if path.exists():
            self.tau = json.loads(path.read_text(encoding="utf-8"))["tau"]
