"""The rows of every step of a training in stages, and the sampler that yields them.

The whole training is one epoch, whose order is planned before it begins. It depends on the seed, the stages and the
rows alone, so it is the same on every rank, for any number of ranks, and in a resumed run.

Shapes: N rows, D draws of a row.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dft.batching.packing import PackedRows
from dft.batching.plan import BatchPlan
from dft.batching.sampler import grouped_by_length
from dft.config.stages import Stage
from dft.errors import UserError

MAX_DRAWS = 200_000_000  # rows that a stage draws, which take some 12 GiB on each rank while they are planned
MAX_ROUNDS = 1_000_000  # passes of a stage, or times that it goes over a source: some 20 microseconds each
INDICES_AT_ONCE = 1 << 16  # that are Python's own integers, of 40 bytes
Sources = dict[str, tuple[np.ndarray, float]]  # the rows of each source, int64, and their weight, see Stage.sources


@dataclass(frozen=True)
class PlannedStage:
    """One stage, with what its steps hold.

    Args:
        first_step: counted from 0.
        rows: the rows that are drawn, in their order, int64 [D].
        items: the item of each draw, int64 [D], from 0 in each stage: a row, or a bin of rows.
    """

    stage: Stage
    first_step: int
    num_steps: int
    rows: np.ndarray
    items: np.ndarray

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from another one, as JSON values by name."""
        digest = hashlib.blake2b(self.rows.tobytes() + self.items.tobytes(), digest_size=8).hexdigest()
        factor = self.stage.learning_rate_factor
        return {"name": self.stage.name, "steps": self.num_steps, "learning_rate_factor": factor, "rows": digest}


@dataclass(frozen=True)
class StagePlan:
    """All stages, one after the other.

    Args:
        items_per_step: rows, or bins of rows, of a step, over ranks and accumulation.
        has_bins: an item is a bin of rows.
    """

    stages: tuple[PlannedStage, ...]
    items_per_step: int
    has_bins: bool

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What decides the steps, see PlannedStage.facts."""
        return [stage.facts for stage in self.stages]

    def number_at(self, step: int) -> int:
        """The number of the stage, from 1, that a step, from 0, is in; behind the last step that of the last stage."""
        return sum(stage.first_step <= step for stage in self.stages)

    def factor_at(self, step: int) -> float:
        """The factor of the learning rate of a step, from 0."""
        return self.stages[self.number_at(step) - 1].stage.learning_rate_factor

    def training_rows(self, rows: Dataset) -> Dataset:
        """The training set: the rows as they are, or bins of them, each of which is an item."""
        if not self.has_bins:
            return rows
        first = np.cumsum([0, *(stage.items[-1] + 1 for stage in self.stages)])
        bins = np.concatenate([stage.items + start for stage, start in zip(self.stages, first[:-1], strict=True)])
        return PackedRows(rows, bins, np.concatenate([stage.rows for stage in self.stages]))

    def order(self) -> "StagedOrder":
        """The order of the items of `training_rows`."""
        if self.has_bins:
            return StagedOrder(np.arange(self.num_steps * self.items_per_step))
        return StagedOrder(np.concatenate([stage.rows for stage in self.stages]))


class StagedOrder(Sampler[int]):
    """Yields the items of all stages: as many as the steps hold, so that no fillers are needed.

    Args:
        items: indices into the dataset, int64.
    """

    def __init__(self, items: np.ndarray):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[int]:
        for first in range(0, len(self.items), INDICES_AT_ONCE):
            yield from self.items[first : first + INDICES_AT_ONCE].tolist()


def plan_stages(
    stages: Sequence[Stage], sources: Sequence[Sources], lengths: np.ndarray, batches: BatchPlan, num_steps: int
) -> StagePlan:
    """Plans the steps of all stages.

    A stage begins with a step of its own: the last step of each is filled up with further rows of it.

    Args:
        sources: of each stage.
        lengths: tokens of each row, int [N].
        batches: how rows become batches; bins are made of the rows of one pass of one stage.
        num_steps: of the training, which stages in steps share. Those in epochs have their own.

    Raises:
        UserError: a stage would have no step, or no row, or more of them than can be planned.
        ValueError: bins are to be grouped by length, which would move rows into other bins.
    """
    has_bins = batches.bins(lengths[:1]) is not None
    if has_bins and batches.strategy == "group_by_length":
        raise ValueError("the strategy group_by_length needs rows that are items of their own, not bins; use random")
    planned: list[PlannedStage] = []
    done, share = 0, 0
    for number, (stage, of_stage) in enumerate(zip(stages, sources, strict=True)):
        steps = None
        if stage.steps is not None:
            share += stage.steps
            end = num_steps if number == len(stages) - 1 else math.floor(share * num_steps + 0.5)
            steps = end - done
        drawn = _Draws(stage, of_stage, lengths, batches, number).fill(steps)
        planned.append(PlannedStage(stage, done, *drawn))
        done += planned[-1].num_steps
    return StagePlan(tuple(planned), batches.rows_per_batch * batches.batches_per_step, has_bins)


class _Stream:
    """The rows of a source, int64, again and again.

    Args:
        rng: of a new order each time; None for the order in which they stand.
    """

    def __init__(self, rows: np.ndarray, rng: np.random.Generator | None):
        self._rows, self._rng = rows, rng
        self._rest = rows[:0]

    def take(self, count: int) -> np.ndarray:
        """The next rows, int64 [count]."""
        parts, length = [self._rest], len(self._rest)
        while length < count:
            parts.append(self._rows if self._rng is None else self._rng.permutation(self._rows))
            length += len(parts[-1])
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        taken, self._rest = rows[:count], rows[count:]
        return taken


class _Draws:
    """What one stage draws, pass by pass.

    Each source is a stream: its rows in random order, then all of them again in another order. A pass takes from it
    the number of rows that the weight says, so that after whole passes no row of a source has been drawn more than
    once more often than another.
    """

    def __init__(self, stage: Stage, sources: Sources, lengths: np.ndarray, batches: BatchPlan, number: int):
        self._stage, self._lengths, self._batches = stage, lengths, batches
        self._rng = np.random.default_rng([batches.seed, number])
        self._keeps_order = batches.strategy == "sequential"
        self._streams = [_Stream(rows, None if self._keeps_order else self._rng) for rows, _ in sources.values()]
        self._quotas = [weight * len(rows) for rows, weight in sources.values()]  # rows of a source in a pass
        self._largest_weight = max(weight for _, weight in sources.values())
        self._passes = 0
        if sum(map(round, self._quotas)) == 0:
            raise UserError(f"{stage.place}: a pass of stage {stage.name!r} has less than one row; raise its weights")

    def _next_pass(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the next pass and their items, numbered from 0, int64 [D]."""
        before, self._passes = self._passes, self._passes + 1
        counts = [round(self._passes * quota) - round(before * quota) for quota in self._quotas]
        rows = np.concatenate([stream.take(count) for stream, count in zip(self._streams, counts, strict=True)])
        rows = np.sort(rows) if self._keeps_order else self._rng.permutation(rows)
        bins = self._batches.bins(self._lengths[rows]) if len(rows) else None
        if bins is None:
            return rows, np.arange(len(rows))
        if not self._keeps_order:
            bins = self._rng.permutation(int(bins.max()) + 1)[bins]
        order = np.argsort(bins, kind="stable")
        return rows[order], bins[order]

    def fill(self, steps: int | None) -> tuple[int, np.ndarray, np.ndarray]:
        """The number of steps, and what they hold: rows and their items, int64 [D].

        Args:
            steps: None for as many as the stage's epochs take.

        Raises:
            UserError: it has no step, or too many.
        """
        per_step = self._batches.rows_per_batch * self._batches.batches_per_step
        rows, items, count, num_rows = [], [], 0, 0
        passes = math.inf if self._stage.epochs is None else self._stage.epochs
        # a step holds at least a row for each item, so this is the least that is drawn
        self._check_size(sum(self._quotas) * max(1, passes) if steps is None else steps * per_step)
        while count < (math.inf if steps is None else steps * per_step):
            new_rows, new_items = self._next_pass()
            num_rows += len(new_rows)
            self._check_size(num_rows)
            rows.append(new_rows)
            items.append(new_items + count)
            in_pass = int(new_items[-1]) + 1 if len(new_items) else 0
            if steps is None and self._passes >= passes:
                wanted = count + (passes - self._passes + 1) * in_pass
                steps = max(1, math.ceil(wanted / per_step - 1e-9))
            count += in_pass
        if steps < 1:
            raise UserError(
                f"{self._stage.place}: stage {self._stage.name!r} has {float(100 * self._stage.steps):g}% of the "
                "steps, which is less than one; give it more, or raise --max_steps"
            )
        every_row, every_item = np.concatenate(rows), np.concatenate(items)
        kept = every_item < steps * per_step
        return steps, *self._grouped(every_row[kept], every_item[kept])

    def _check_size(self, num_rows: float) -> None:
        """Checks that so many rows of the stage can be planned.

        Raises:
            UserError: they are too many, or too many passes.
        """
        num_rows = max(num_rows, sum(self._quotas))  # a pass is drawn whole
        rounds = num_rows / sum(self._quotas) * max(1, self._largest_weight)
        if num_rows <= MAX_DRAWS and rounds <= MAX_ROUNDS:
            return
        remedy = "its epochs" if self._stage.steps is None else "--max_steps, --num_train_epochs"
        raise UserError(
            f"{self._stage.place}: stage {self._stage.name!r} draws at least {num_rows:,.0f} rows and goes "
            f"{rounds:,.0f} times over its sources; a stage can draw at most {MAX_DRAWS:,} rows and go at most "
            f"{MAX_ROUNDS:,} times over its sources: lower {remedy} or the numbers of its sources"
        )

    def _grouped(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, with rows of similar length in a step where the strategy is group_by_length."""
        if self._batches.strategy != "group_by_length":
            return rows, items
        generator = torch.Generator().manual_seed(int(self._rng.integers(2**63)))
        per_step = self._batches.rows_per_batch * self._batches.batches_per_step
        lengths = torch.from_numpy(np.asarray(self._lengths))
        return grouped_by_length(torch.from_numpy(rows), lengths, per_step, generator).numpy(), items
