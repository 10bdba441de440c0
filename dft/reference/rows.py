"""Rows with a column of log-probabilities by the starting weights, which is filled in when these are known.

Shapes: T tokens of a row, N supervised tokens of all rows.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from dft.batching.collators import unpack_rows
from dft.batching.packing import PackedRows
from dft.constants import IGNORE_INDEX, REFERENCE_COLUMN


class ReferenceRows(Dataset):
    """A dataset whose rows get the column reference_log_p, float32 [T]: 0 where nothing is supervised.

    Args:
        rows: a map-style dataset with input_ids and labels.

    Attributes:
        is_filled: whether the column is there.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows
        self.is_filled = False
        self._values = np.zeros(0, dtype=np.float32)  # of the supervised tokens of all rows
        self._starts = np.zeros(1, dtype=np.int64)  # where those of a row begin

    def fill(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Fills in the column.

        Args:
            values: of the supervised tokens of all rows in their order, float32 [N].
            counts: supervised tokens of each row, int.

        Raises:
            ValueError: they don't belong to these rows.
        """
        if len(counts) != len(self.rows) or counts.sum() != len(values):
            raise ValueError(f"{len(values)} values of {len(counts)} rows are given for {len(self.rows)} rows")
        self._values, self._starts = values, np.concatenate([[0], np.cumsum(counts)])
        self.is_filled = True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if not self.is_filled:
            return row
        column = np.zeros(len(row["labels"]), dtype=np.float32)
        column[is_supervised(row["labels"])] = self._values[self._starts[index] : self._starts[index + 1]]
        return row | {REFERENCE_COLUMN: column}


def is_supervised(labels: Any) -> np.ndarray:
    """Which tokens of a row count in the loss, bool [T]; the first one doesn't, because nothing predicts it."""
    supervised = np.asarray(labels) != IGNORE_INDEX
    supervised[:1] = False
    return supervised


class CollatorWithColumn:
    """A collator of rows that may have the column, which puts it beside the labels: float32, of their shape.

    Args:
        collator: of any kind that keeps the order of the supervised tokens: with padding on either side, or without.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = unpack_rows(features)
        with_column = [row for row in rows if row.get(REFERENCE_COLUMN) is not None]
        if not with_column:
            return self.collator(features)
        if len(with_column) < len(rows):
            raise ValueError(f"{len(rows) - len(with_column)} of {len(rows)} rows lack the column {REFERENCE_COLUMN}")
        batch = self.collator([_without_column(row) for row in rows])
        values = [np.asarray(row[REFERENCE_COLUMN], dtype=np.float32)[is_supervised(row["labels"])] for row in rows]
        column = torch.zeros(batch["labels"].shape)
        column[batch["labels"] != IGNORE_INDEX] = torch.from_numpy(np.concatenate(values))
        return {**batch, REFERENCE_COLUMN: column}


def _without_column(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose first token, which nothing predicts, isn't supervised, so that the others are as many as values."""
    labels = np.where(is_supervised(row["labels"]), row["labels"], IGNORE_INDEX).tolist()
    return {name: value for name, value in row.items() if name != REFERENCE_COLUMN} | {"labels": labels}


def with_reference(dataset: Any) -> Any:
    """A dataset, or a dictionary of them, whose rows can get the column; those that have it stay as they are.

    Raises:
        ValueError: the rows come without a length, so that they can't be scored once before the training.
    """
    if dataset is None or isinstance(dataset, ReferenceRows):
        return dataset
    if isinstance(dataset, dict):
        return {name: with_reference(rows) for name, rows in dataset.items()}
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError("an objective that needs the starting weights can't train on a dataset without a length")
    if isinstance(dataset, PackedRows):
        packed = copy.copy(dataset)
        packed.rows = with_reference(dataset.rows)
        return packed
    has_column = len(dataset) == 0 or REFERENCE_COLUMN in dataset[0]
    return dataset if has_column else ReferenceRows(dataset)


def rows_to_fill(dataset: Any) -> dict[str, ReferenceRows]:
    """The rows of a dataset, or of a dictionary of them, that have no values yet, by name."""
    if isinstance(dataset, dict):
        return {f"{name}{inner}": rows for name, d in dataset.items() for inner, rows in rows_to_fill(d).items()}
    rows = dataset.rows if isinstance(dataset, PackedRows) else dataset
    return {"": rows} if isinstance(rows, ReferenceRows) and not rows.is_filled else {}
