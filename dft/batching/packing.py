"""Bin packing: which rows share a packed row, or a micro-batch, of a limited number of tokens.

Shapes: N rows.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dft.constants import PADDED_TO

DOCUMENTS = "documents"  # key of the rows of a bin in an item of PackedRows


def best_fit_decreasing(lengths: np.ndarray, capacity: int, seed: int = 0) -> np.ndarray:
    """Assigns rows to few bins of at most `capacity` tokens, the longest first, each to the fullest bin that has room.

    Best-fit decreasing leaves almost no room on chats (over 99 % full), and is fast here because bins with the same
    room are kept together: finding one is a binary search among at most `capacity` different rooms.

    Args:
        lengths: tokens of each row, int [N], from 1 to `capacity`.
        seed: decides among rows of the same length.

    Returns:
        The bin of each row, int64 [N]. Bins are numbered from 0 without gaps, in the order of their first rows.

    Raises:
        ValueError: a row fits no bin.
    """
    order = _shuffled(lengths, capacity, seed)
    order = order[np.argsort(-lengths[order], kind="stable")]
    bin_of = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    bins_with_room: dict[int, list[int]] = {}  # room left, in tokens -> bins
    rooms: list[int] = []  # the keys of bins_with_room, sorted
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = num_bins, capacity
            num_bins += 1
        else:
            room = rooms[place]
            chosen = bins_with_room[room].pop()
            if not bins_with_room[room]:
                del bins_with_room[room], rooms[place]
        bin_of[index] = chosen
        left = room - length
        if left in bins_with_room:
            bins_with_room[left].append(chosen)
        else:
            bins_with_room[left] = [chosen]
            insort(rooms, left)
    return _renumbered(bin_of)


def next_fit(lengths: np.ndarray, capacity: int, seed: int = 0) -> np.ndarray:
    """Assigns rows to bins in a random order; a bin is closed when the next row doesn't fit.

    Arguments, result and errors are those of best_fit_decreasing. Its bins are less full, but which rows share one is
    independent of their lengths.
    """
    order = _shuffled(lengths, capacity, seed)
    return _fill(lengths, order, lambda num_tokens, num_rows, length: num_tokens + length <= capacity)


def next_fit_padded(lengths: np.ndarray, capacity: int, seed: int = 0) -> np.ndarray:
    """Assigns rows to bins in the order of their lengths, counting each row as padded to the longest of its bin.

    Arguments, result and errors are those of best_fit_decreasing. Sorting keeps the padding small.
    """
    padded = round_up(lengths)
    order = _shuffled(padded, capacity, seed)
    order = order[np.argsort(padded[order], kind="stable")]
    # rows come in ascending order, so that the next one is the longest
    return _fill(padded, order, lambda _, num_rows, length: (num_rows + 1) * length <= capacity)


def _shuffled(lengths: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """A random order of the rows, int64 [N]; checks their lengths."""
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"rows of {lengths.min()} to {lengths.max()} tokens can't be put into {capacity} tokens")
    return np.random.default_rng(seed).permutation(len(lengths))


def _fill(lengths: np.ndarray, order: np.ndarray, fits: Callable[[int, int, int], bool]) -> np.ndarray:
    """Fills bins one after the other.

    Args:
        fits: called with the tokens and rows of the current bin and the length of the next row; whether that still
            fits.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    current = num_tokens = num_rows = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if num_rows and not fits(num_tokens, num_rows, length):
            current, num_tokens, num_rows = current + 1, 0, 0
        bin_of[index] = current
        num_tokens, num_rows = num_tokens + length, num_rows + 1
    return _renumbered(bin_of)


def _renumbered(bin_of: np.ndarray) -> np.ndarray:
    """Numbers bins by their first rows, so that bins in sequence follow the order of the dataset."""
    _, first = np.unique(bin_of, return_index=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[bin_of]


def round_up(lengths: Any) -> Any:
    """Rounds a length, or an array of lengths, up to a multiple of PADDED_TO, as PaddingCollator does."""
    return -(-lengths // PADDED_TO) * PADDED_TO


def padded_tokens(lengths: np.ndarray, bin_of: np.ndarray) -> int:
    """Counts the tokens of all bins, including padding, if each row is padded to the longest of its bin.

    Args:
        lengths, bin_of: tokens and bin of each row, int [N].
    """
    longest = np.zeros(int(bin_of.max()) + 1, dtype=np.int64)
    np.maximum.at(longest, bin_of, lengths)
    return int((round_up(longest) * np.bincount(bin_of)).sum())


class PackedRows(Dataset):
    """Groups the rows of a dataset by bins: item i is {"documents": [the rows of bin i]}; collators take it apart.

    Args:
        rows: a map-style dataset.
        bin_of: the bin of each row, int64 [N].
        drawn: in place of every row once, these rows, int64 [N], each as often as it is there.
    """

    def __init__(self, rows: Dataset, bin_of: np.ndarray, drawn: np.ndarray | None = None):
        self.rows = rows
        order = np.argsort(bin_of, kind="stable")
        self._order = order if drawn is None else drawn[order]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(bin_of))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, list[dict[str, Any]]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        members = self._order[self._starts[index] : self._starts[index + 1]]
        return {DOCUMENTS: [self.rows[int(i)] for i in members]}
