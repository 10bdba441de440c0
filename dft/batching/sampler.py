"""Which row comes when: every row once in an epoch, the same on any number of ranks and after a resume."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import TrainerCallback

from dft.batching.collators import documents
from dft.labels import IGNORE_INDEX


class FilledRows(Dataset):
    """A dataset made as long as a multiple of `multiple` by short rows without supervised tokens.

    A distributed sampler evens out the ranks by repeating rows, which would count them twice. Rows
    that supervise nothing add nothing to any sum.
    """

    @staticmethod
    def can_fill(rows: Any) -> bool:
        """Whether rows are of a kind whose fillers supervise nothing: with input_ids and labels."""
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__") or len(rows) == 0:
            return False
        return {"input_ids", "labels"} <= set(documents([rows[0]])[0])

    def __init__(self, rows: Dataset, multiple: int):
        self.rows = rows
        self.length = -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        if index >= self.length:
            raise IndexError(index)
        row = documents([self.rows[0]])[0]
        length = len(row["input_ids"])
        filler = {
            key: value[:2] if hasattr(value, "__len__") and len(value) == length else value
            for key, value in row.items()
        }
        return filler | {"labels": [IGNORE_INDEX] * min(2, length)}


class EpochOrder(Sampler[int]):
    """The order of the rows in each epoch: every row once, then the fillers of FilledRows.

    The order of an epoch depends on the seed and the epoch's number alone, so that all ranks, any number of
    them, and a resumed run have the same.

    Args:
        num_rows: without fillers.
        total: with them.
        strategy: random; sequential; or group_by_length, random but with rows of similar length in a step.
        lengths: tokens of each row, for group_by_length.
        rows_per_step: of all ranks and micro-batches.
    """

    GROUPED_STEPS = 50  # steps' worth of random rows, among which those of similar length are put together

    def __init__(
        self,
        num_rows: int,
        total: int,
        *,
        seed: int,
        strategy: str = "random",
        lengths: np.ndarray | None = None,
        rows_per_step: int = 1,
    ):
        if strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(f"strategy must be random, sequential or group_by_length, got {strategy!r}")
        if lengths is not None and len(lengths) != num_rows:
            raise ValueError(f"{len(lengths)} lengths are given for {num_rows} rows")
        self.num_rows = num_rows
        self.total = total
        self.seed = seed
        self.strategy = strategy
        self.lengths = None if lengths is None else torch.from_numpy(np.asarray(lengths))
        self.rows_per_step = rows_per_step
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from self._rows().tolist()
        yield from range(self.num_rows, self.total)

    def _rows(self) -> torch.Tensor:
        if self.strategy == "sequential":
            return torch.arange(self.num_rows)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        if self.strategy == "random":
            return order
        steps = []
        for some in order.split(self.GROUPED_STEPS * self.rows_per_step):
            by_length = some[torch.argsort(self.lengths[some], descending=True, stable=True)]
            whole = list(by_length.split(self.rows_per_step))
            # a step that isn't full stays the last
            rest = [whole.pop()] if len(whole[-1]) < self.rows_per_step else []
            steps += [whole[i] for i in torch.randperm(len(whole), generator=generator)] + rest
        return torch.cat(steps)


class TellEpoch(TrainerCallback):
    """Tells a trainer's EpochOrder the epoch. The loader that Trainer resumes with on several ranks doesn't."""

    def __init__(self, order_of: Callable[[], EpochOrder | None]):
        self._order_of = order_of

    def on_epoch_begin(self, args, state, control, **kwargs):
        order = self._order_of()
        if order is not None:
            order.set_epoch(int(state.epoch))


def token_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, int64 [N]."""
    return np.array([sum(len(row["input_ids"]) for row in documents([rows[i]])) for i in range(len(rows))])
