"""Rows into bins of so many tokens: which rows share a row, or a micro-batch."""

from bisect import bisect_left, insort
from typing import Any

import numpy as np
from torch.utils.data import Dataset

PADDED_TO = 8  # padded rows are as long as a multiple of so many tokens
DOCUMENTS = "documents"  # the rows of a bin, in the item that PackedRows gives


def best_fit_decreasing(lengths: np.ndarray, capacity: int, seed: int = 0) -> np.ndarray:
    """The bin of each row, so that few bins hold all and none holds more than `capacity` tokens.

    The longest rows come first, each into the bin that it leaves the least room in. The seed decides among rows of
    the same length.

    Args:
        lengths: tokens of each row, [N], from 1 to `capacity`.

    Returns:
        int64 [N], from 0 without gaps, in the order of their first rows.

    Raises:
        ValueError: a row that no bin holds.
    """
    order = _shuffled(lengths, capacity, seed)
    order = order[np.argsort(-lengths[order], kind="stable")]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    bins_with: dict[int, list[int]] = {}  # room left -> bins
    rooms: list[int] = []  # its keys, sorted
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[place]
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                del bins_with[room], rooms[place]
        bin_of[index] = chosen
        left = room - length
        if left in bins_with:
            bins_with[left].append(chosen)
        else:
            bins_with[left] = [chosen]
            insort(rooms, left)
    return _numbered(bin_of)


def next_fit(lengths: np.ndarray, capacity: int, seed: int = 0) -> np.ndarray:
    """As best_fit_decreasing, for rows in a random order: a bin is closed when the next row doesn't fit."""
    order = _shuffled(lengths, capacity, seed)
    return _fill(lengths, order, lambda filled, count, length: filled + length <= capacity)


def next_fit_padded(lengths: np.ndarray, capacity: int, seed: int = 0) -> np.ndarray:
    """As next_fit, for rows in the order of their lengths, each padded to the longest of its bin."""
    padded = round_up(lengths)
    order = _shuffled(padded, capacity, seed)
    order = order[np.argsort(padded[order], kind="stable")]
    return _fill(padded, order, lambda _, count, length: (count + 1) * length <= capacity)


def _shuffled(lengths: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"rows of {lengths.min()} to {lengths.max()} tokens can't be put into {capacity} tokens")
    return np.random.default_rng(seed).permutation(len(lengths))


def _fill(lengths: np.ndarray, order: np.ndarray, fits) -> np.ndarray:
    """Bins filled one after the other; `fits` tells from the tokens and rows of one if the next row still fits."""
    bin_of = np.empty(len(lengths), dtype=np.int64)
    current = filled = count = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if count and not fits(filled, count, length):
            current, filled, count = current + 1, 0, 0
        bin_of[index] = current
        filled, count = filled + length, count + 1
    return _numbered(bin_of)


def _numbered(bin_of: np.ndarray) -> np.ndarray:
    """Bins numbered by their first rows, so that in sequence they follow the order of the rows."""
    _, first = np.unique(bin_of, return_index=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[bin_of]


def round_up(lengths: Any) -> Any:
    """A length, or an array of them, to the next multiple of PADDED_TO."""
    return -(-lengths // PADDED_TO) * PADDED_TO


def padded_tokens(lengths: np.ndarray, bin_of: np.ndarray) -> int:
    """Tokens of all bins, padding among them, if rows are padded to the longest of their bin."""
    longest = np.zeros(int(bin_of.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, bin_of, lengths)
    return int((round_up(longest) * np.bincount(bin_of)).sum())


class PackedRows(Dataset):
    """Rows of a dataset by bins: item i is {"documents": the rows of bin i}, which the collators take apart.

    Args:
        rows: a map-style dataset.
        bin_of: the bin of each row, int64 [N].
    """

    def __init__(self, rows: Dataset, bin_of: np.ndarray):
        self.rows = rows
        self._order = np.argsort(bin_of, kind="stable")
        self._borders = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, index: int) -> dict[str, list[dict[str, Any]]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        members = self._order[self._borders[index] : self._borders[index + 1]]
        return {DOCUMENTS: [self.rows[int(i)] for i in members]}
