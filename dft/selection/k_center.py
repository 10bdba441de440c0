"""K-center greedy: choose rows so that every row is near a chosen one (Sener & Savarese, arXiv 1708.00489).

The row that is farthest from all chosen rows is chosen next. Plain greedy compares every row with every chosen one.
Here a row's distance is kept as an upper bound, which was right when the row was last compared, and only the rows with
the largest bounds are brought up to date: distances never grow, so that a row whose bound is smaller can't be the
farthest. Products in float32 tell which comparisons can matter, within a bound of their rounding errors, and these are
made in float64: the choice is that of plain greedy in float64.

Shapes: N rows, S seeds, H dimensions, P rows of the pool, C centers that are compared at once, K picks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dft.errors import UserError

POOL_ROWS = 512  # rows that are kept up to date; at 1,024 dimensions they fit a core's cache
CENTERS_AT_ONCE = 256
ROWS_AT_ONCE = 4096  # of a pass over all rows
PAIRS_AT_ONCE = 2048  # compared in float64
LISTED_ROWS = 5  # in messages


@dataclass(frozen=True)
class Cover:
    """The chosen rows.

    Attributes:
        picks: rows in the order in which they were chosen, int64 [K].
        distances: of each pick to the seeds and the picks before it, float64 [K]; infinite where there are none.
        radius: the largest distance of any row to the nearest seed or pick.
    """

    picks: np.ndarray
    distances: np.ndarray
    radius: float


def k_center_greedy(
    embeddings: np.ndarray | Tensor,
    num_rows: int | None = None,
    radius: float = 0.0,
    seeds: np.ndarray | Tensor | None = None,
) -> Cover:
    """Chooses rows until there are `num_rows`, or no row is farther than `radius` from a seed or a chosen row.

    Without seeds the first row is that which is nearest to the mean of all. Of rows that are equally far, the one
    that comes first is chosen. Copies of chosen rows are never chosen: they have the distance 0.

    Args:
        embeddings: of the rows, [N, H]; taken as float32.
        num_rows: at most so many rows are chosen; None for as many as the radius takes.
        radius: Euclidean distance that is near enough.
        seeds: embeddings of what is chosen already, [S, H].

    Raises:
        UserError: a number isn't finite, or too large to be squared.
        ValueError: the shapes don't fit.
    """
    rows = _as_floats(embeddings, "row")
    first = _as_floats(seeds, "row of the seeds") if seeds is not None else rows[:0]
    if rows.ndim != 2 or first.ndim != 2 or (len(first) and first.shape[1] != rows.shape[1]):
        raise ValueError(f"embeddings {list(rows.shape)} and seeds {list(first.shape)} must be [N, H] and [S, H]")
    wanted = len(rows) if num_rows is None else min(num_rows, len(rows))
    greedy = _Greedy(torch.cat([first, rows]) if len(first) else rows, num_seeds=len(first))
    return greedy.choose(wanted, radius)


def _as_floats(embeddings: np.ndarray | Tensor, what: str) -> Tensor:
    """Embeddings as float32; raises UserError that names the rows whose numbers aren't finite."""
    floats = torch.as_tensor(embeddings).to(device="cpu", dtype=torch.float32).contiguous()
    finite = [chunk.isfinite().flatten(1).all(1) for chunk in floats.split(ROWS_AT_ONCE)]
    bad = (~torch.cat(finite)).nonzero().flatten().tolist() if finite else []
    if bad:
        listed = ", ".join(map(str, bad[:LISTED_ROWS])) + (", …" if len(bad) > LISTED_ROWS else "")
        raise UserError(
            f"embeddings must be finite: {len(bad)} of {len(floats)} are NaN or infinite, {what} {listed} (from 0). "
            "Compute these again, or leave their rows out"
        )
    return floats


class _Greedy:
    """The state of one choice.

    Args:
        points: the seeds, then the rows, float32 [S + N, H].
        num_seeds: S.
    """

    def __init__(self, points: Tensor, num_seeds: int):
        self._points = points
        self._num_seeds = num_seeds
        # less than the whole is lost to rounding where the numbers are small
        self._centered = points - points.mean(0, dtype=torch.float64).float()
        self._squares = self._centered.square().sum(1)
        if not bool(self._squares.isfinite().all()):
            raise UserError("embeddings are too large to be squared in 32 bits: scale them down")
        # A product of H terms in float32 is off by at most H * eps / 2 of the product of the norms; the rest is for
        # the roundings of the centered numbers, the squares and the sums
        self._slack = (points.shape[1] + 32) * torch.finfo(torch.float32).eps
        num_rows = len(points) - num_seeds
        self._bound = np.full(num_rows, np.inf)  # squared distances to the centers that were seen, or more, float64
        self._seen = np.zeros(num_rows, dtype=np.int64)  # centers that a row was compared with, from the first on
        self._centers = list(range(num_seeds))  # as points

    def choose(self, wanted: int, radius: float) -> Cover:
        """See k_center_greedy."""
        picks: list[int] = []
        distances: list[float] = []
        if len(self._bound) == 0:
            return Cover(np.zeros(0, np.int64), np.zeros(0), 0.0)
        if not self._centers and wanted > 0:
            picks, distances = [int(self._squares.argmin())], [float("inf")]
            self._centers.append(picks[0])
        if not self._centers:
            return Cover(np.zeros(0, np.int64), np.zeros(0), float("inf"))
        self._compare_all()
        pool = self._largest()
        while True:
            row = self._farthest(pool)
            if row is None:
                pool = self._largest()
                continue
            distance = float(np.sqrt(self._bound[row]))
            if len(picks) >= wanted or distance <= radius:
                return Cover(np.array(picks, dtype=np.int64), np.array(distances), distance)
            picks.append(row)
            distances.append(distance)
            self._centers.append(self._num_seeds + row)
            self._update(pool, len(self._centers) - 1)

    def _compare_all(self) -> None:
        """Compares all rows with the first centers."""
        for rows in np.array_split(np.arange(len(self._bound)), -(-len(self._bound) // ROWS_AT_ONCE)):
            self._update(_Pool(rows, self._centered[self._num_seeds + rows], np.inf, -1), 0)

    def _largest(self) -> "_Pool":
        """The rows of the largest bounds, brought up to date; of equal ones those that come first."""
        size = min(POOL_ROWS, len(self._bound))
        least = np.partition(self._bound, len(self._bound) - size)[len(self._bound) - size]
        above = np.flatnonzero(self._bound > least)
        rows = np.concatenate([above, np.flatnonzero(self._bound == least)[: size - len(above)]])
        rows = rows[np.argsort(self._seen[rows], kind="stable")]
        outside = self._bound.copy()
        outside[rows] = -np.inf
        next_row = int(outside.argmax())
        pool = _Pool(rows, self._centered[self._num_seeds + rows], float(outside[next_row]), next_row)
        self._update(pool, int(self._seen[rows[0]]))
        return pool

    def _farthest(self, pool: "_Pool") -> int | None:
        """The row that is farthest from all centers; None if a row outside the pool may be farther."""
        bounds = self._bound[pool.rows]
        most = bounds.max()
        row = int(pool.rows[bounds == most].min())
        is_first = most > pool.largest_outside or (most == pool.largest_outside and row < pool.next_row)
        return row if is_first else None

    def _update(self, pool: "_Pool", first: int) -> None:
        """Compares the rows of a pool with the centers from `first` on that they haven't seen."""
        for start in range(first, len(self._centers), CENTERS_AT_ONCE):
            end = min(start + CENTERS_AT_ONCE, len(self._centers))
            # rows come in the order of what they have seen
            count = int(np.searchsorted(self._seen[pool.rows], end))
            self._compare(pool.rows[:count], pool.centered[:count], self._centers[start:end])
            self._seen[pool.rows[:count]] = end

    def _compare(self, rows: np.ndarray, centered: Tensor, centers: list[int]) -> None:
        """Lowers the bounds of rows to their distances to some centers.

        Args:
            rows: int64 [P]; centered: their numbers, [P, H].
        """
        of_center = torch.tensor(centers)
        squares = self._squares[self._num_seeds + rows][:, None] + self._squares[of_center]  # [P, C]
        about = squares - 2 * (centered @ self._centered[of_center].T)
        error = self._slack * squares
        bound = torch.from_numpy(self._bound[rows]).float()
        limit = torch.minimum(bound, (about + error).amin(1))  # the new bound is not more than this
        places, which = (about - error <= limit[:, None]).nonzero(as_tuple=True)
        for place, center in zip(places.split(PAIRS_AT_ONCE), of_center[which].split(PAIRS_AT_ONCE), strict=True):
            pair_rows = rows[place.numpy()]
            gap = self._points[self._num_seeds + pair_rows].double() - self._points[center].double()
            np.minimum.at(self._bound, pair_rows, gap.square_().sum(1).numpy())


@dataclass(frozen=True)
class _Pool:
    """Rows that are kept up to date.

    Attributes:
        rows: int64 [P], in the order of the number of centers they had seen.
        centered: their numbers, float32 [P, H].
        largest_outside: the largest bound of another row, and
        next_row: the first of the rows that have it.
    """

    rows: np.ndarray
    centered: Tensor
    largest_outside: float
    next_row: int
