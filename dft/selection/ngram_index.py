"""Which rows hold which n-grams: a sorted array of hashes, each with the rows that have it."""

import numpy as np

from dft.selection.shingles import Hashes


class NgramIndex:
    """The n-grams of rows: add them in batches, then build, then find.

    Attributes:
        is_empty: whether it holds no n-gram, once it is built.
        sizes: int64 [R], the different n-grams of each row; 0 for rows that are not in the index.
    """

    def __init__(self) -> None:
        self.is_empty = True
        self.sizes = np.zeros(0, dtype=np.int64)
        self._hashes: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []

    def add(self, hashes: Hashes, first: int, wanted: np.ndarray) -> None:
        """Adds some rows of a batch.

        Args:
            first: the number of the batch's first row.
            wanted: bool [R of the batch], the rows to add.
        """
        row = np.repeat(np.arange(len(wanted)), np.diff(hashes.offsets))
        self._hashes.append(hashes.values[wanted[row]])
        self._owners.append(first + row[wanted[row]])

    def build(self, num_rows: int) -> None:
        """Sorts what was added, each n-gram of a row once."""
        empty = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
        hashes = np.concatenate([empty[0], *self._hashes])
        owners = np.concatenate([empty[1], *self._owners])
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        is_first = np.ones(len(hashes), dtype=bool)
        is_first[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
        hashes, self._all_owners = hashes[is_first], owners[is_first]
        self._unique, self._starts = np.unique(hashes, return_index=True)
        self._starts = np.append(self._starts, len(hashes))
        self.sizes = np.bincount(self._all_owners, minlength=num_rows)
        self._hashes, self._owners = [], []
        self.is_empty = len(self._unique) == 0
        bits = min(max(len(self._unique) * 16, 1).bit_length(), 28)
        self._shift = np.uint64(64 - bits)
        self._starts_held = np.zeros(1 << bits, dtype=bool)  # most hashes are not in the index: rules these out
        self._starts_held[self._unique >> self._shift] = True

    def find(self, values: np.ndarray) -> np.ndarray:
        """The place of each hash among the different n-grams, int64 [N]; -1 where the index doesn't hold it."""
        found = np.full(len(values), -1)
        maybe = np.flatnonzero(self._starts_held[values >> self._shift])
        if len(maybe):
            places = np.minimum(np.searchsorted(self._unique, values[maybe]), len(self._unique) - 1)
            found[maybe] = np.where(self._unique[places] == values[maybe], places, -1)
        return found

    def owners_of(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some n-grams, one n-gram after the other, and how many each has."""
        lengths = self._starts[places + 1] - self._starts[places]
        owners = [self._all_owners[start : start + n] for start, n in zip(self._starts[places], lengths, strict=True)]
        return np.concatenate(owners), lengths
