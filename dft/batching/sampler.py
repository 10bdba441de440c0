"""Deterministic sampler, independent of the number of ranks, and the fillers that keep it so.

Shapes: N rows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import TrainerCallback

from dft.batching.collators import unpack_rows
from dft.constants import IGNORE_INDEX

# group_by_length sorts this many steps' worth of random rows at a time: enough that steps hold rows of similar
# length, and few enough that an epoch stays mixed
GROUPED_STEPS = 50


class FilledRows(Dataset):
    """Extends a dataset to a multiple of `multiple` rows by short fillers without supervised tokens.

    A distributed sampler evens out the ranks by repeating rows, which would count them twice. Fillers supervise
    nothing, so they add nothing to any sum.
    """

    @staticmethod
    def can_fill(rows: Any) -> bool:
        """Whether fillers can be made for a dataset: it has a length, and rows with input_ids and labels."""
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__") or len(rows) == 0:
            return False
        return {"input_ids", "labels"} <= set(unpack_rows([rows[0]])[0])

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
        # made from a real row, so that it has the same columns; those with a value per token are cut to two tokens
        row = unpack_rows([self.rows[0]])[0]
        length = len(row["input_ids"])
        filler = {
            key: value[:2] if hasattr(value, "__len__") and len(value) == length else value
            for key, value in row.items()
        }
        return filler | {"labels": [IGNORE_INDEX] * min(2, length)}


class EpochOrder(Sampler[int]):
    """Yields every row of an epoch once, then the fillers of FilledRows.

    The order depends on the seed and the number of the epoch alone, so it is the same on every rank, for any number of
    ranks, and in a resumed run.

    Args:
        num_rows: rows of the dataset, without fillers.
        total: rows with fillers.
        seed: of the order, with the epoch added to it.
        strategy: "random", "sequential", or "group_by_length": random, but with rows of similar length in a step.
        lengths: tokens of each row, int [N]; needed for group_by_length.
        rows_per_step: over all ranks and micro-batches.

    Raises:
        ValueError: an unknown strategy, or lengths of another number of rows.
    """

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
        """Chooses the epoch, counted from 0, whose order is yielded from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from self._row_order().tolist()
        yield from range(self.num_rows, self.total)

    def _row_order(self) -> torch.Tensor:
        """The order of the rows, int64 [N]."""
        if self.strategy == "sequential":
            return torch.arange(self.num_rows)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_rows, generator=generator)
        if self.strategy == "random":
            return order
        return grouped_by_length(order, self.lengths, self.rows_per_step, generator)


def grouped_by_length(
    order: torch.Tensor, lengths: torch.Tensor, rows_per_step: int, generator: torch.Generator
) -> torch.Tensor:
    """Regroups a random order of rows into steps of similar length, which come in random order themselves.

    Args:
        order: rows, int64.
        lengths: tokens of each row.
    """
    steps = []
    for chunk in order.split(GROUPED_STEPS * rows_per_step):
        by_length = chunk[torch.argsort(lengths[chunk], descending=True, stable=True)]
        full = list(by_length.split(rows_per_step))
        # an incomplete step stays the last, because every step after it would be shifted against its rows
        rest = [full.pop()] if len(full[-1]) < rows_per_step else []
        steps += [full[i] for i in torch.randperm(len(full), generator=generator)] + rest
    return torch.cat(steps)


class RepeatedBatches(Sampler[int]):
    """Yields each batch of a sampler `times` times, so that ranks that follow each other get the same one.

    Args:
        sampler_fn: makes the sampler of a dataset; None, or where it gives None, the rows come as they are.
        batch_size: in rows. An incomplete batch at the end is left out; FilledRows has none.
        dataset: of a known length.
    """

    def __init__(self, sampler_fn: Callable | None, batch_size: int, times: int, dataset: Dataset):
        sampler = None if sampler_fn is None else sampler_fn(dataset)
        self.sampler = SequentialSampler(dataset) if sampler is None else sampler
        self.batch_size = batch_size
        self.times = times

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size * self.batch_size * self.times

    def __iter__(self) -> Iterator[int]:
        for batch in BatchSampler(self.sampler, self.batch_size, drop_last=True):
            for _ in range(self.times):
                yield from batch


class SetEpochCallback(TrainerCallback):
    """Passes the epoch on to a trainer's EpochOrder.

    accelerate's data loader does it too, except for the one that a resumed run on several ranks starts with.

    Args:
        get_order: returns the trainer's sampler, or None if it uses another one.
    """

    def __init__(self, get_order: Callable[[], EpochOrder | None]):
        self._get_order = get_order

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Sets the epoch that begins; a resumed run may begin within one."""
        order = self._get_order()
        if order is not None:
            order.set_epoch(int(state.epoch))


def token_lengths(rows: Dataset) -> np.ndarray:
    """Counts the tokens of each item of a dataset, int64 [N]; reads all of it."""
    return np.array([sum(len(row["input_ids"]) for row in unpack_rows([rows[i]])) for i in range(len(rows))])
