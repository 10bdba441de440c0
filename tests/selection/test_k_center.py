"""K-center greedy picks what plain greedy picks, whatever lies how near."""

import numpy as np
import pytest

from dft.errors import UserError
from dft.selection import k_center
from dft.selection.k_center import Cover, k_center_greedy
from dft.selection.k_means import k_means


def plain_greedy(rows: np.ndarray, num_rows: int, seeds: np.ndarray) -> tuple[list[int], list[float], float]:
    """All distances in float64, each time a row is picked."""
    rows = rows.astype(np.float64)
    picks, distances = [], []
    nearest = np.full(len(rows), np.inf)
    for center in seeds.astype(np.float64):
        nearest = np.minimum(nearest, ((rows - center) ** 2).sum(1))
    while len(picks) < num_rows and nearest.max() > 0:
        first = int(((rows - rows.mean(0)) ** 2).sum(1).argmin())
        pick = first if not picks and not len(seeds) else int(nearest.argmax())
        picks.append(pick)
        distances.append(float(np.sqrt(nearest[pick])))
        nearest = np.minimum(nearest, ((rows - rows[pick]) ** 2).sum(1))
    return picks, distances, float(np.sqrt(nearest.max()))


def clustered(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(20, 24))[rng.integers(0, 20, 900)] * 30 + rng.normal(size=(900, 24)) * 0.01


ROWS = {
    "random": lambda rng: rng.normal(size=(900, 24)),
    "far from the origin": lambda rng: rng.normal(size=(700, 8)) + 1000,
    "clusters": clustered,
    "copies": lambda rng: rng.normal(size=(40, 6))[rng.integers(0, 40, 800)],
    "equal distances": lambda rng: np.eye(64)[rng.permutation(64)],
    "one dimension": lambda rng: rng.integers(0, 500, (600, 1)),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("num_seeds", [0, 7])
def test_it_picks_what_plain_greedy_picks(kind, num_seeds, monkeypatch):
    """The pool is smaller than the picks, so that rows come and go."""
    monkeypatch.setattr(k_center, "POOL_ROWS", 16)
    monkeypatch.setattr(k_center, "CENTERS_AT_ONCE", 32)
    monkeypatch.setattr(k_center, "ROWS_AT_ONCE", 100)
    rows = ROWS[kind](np.random.default_rng(0)).astype(np.float32)
    seeds, rows = rows[:num_seeds], rows[num_seeds:]
    found = k_center_greedy(rows, 200, seeds=seeds if num_seeds else None)
    picks, distances, radius = plain_greedy(rows, 200, seeds)
    assert found.picks.tolist() == picks
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    assert found.radius == pytest.approx(radius, rel=1e-12, abs=0)


def test_the_comparison_rejects_bounds_that_are_not_brought_up_to_date(monkeypatch):
    monkeypatch.setattr(k_center, "POOL_ROWS", 16)
    monkeypatch.setattr(k_center._Greedy, "_farthest", lambda self, pool: int(self._bound.argmax()))
    rows = ROWS["random"](np.random.default_rng(0)).astype(np.float32)
    assert k_center_greedy(rows, 200).picks.tolist() != plain_greedy(rows, 200, rows[:0])[0]


def test_a_radius_ends_it():
    rows = np.arange(101, dtype=np.float32)[:, None]
    found = k_center_greedy(rows, radius=12.5)
    assert found.picks.tolist() == [50, 0, 100, 25, 75]  # 12 away at most: 12, 13, 37, 38, ...
    assert found.radius == 12
    assert k_center_greedy(rows, num_rows=2, radius=12.5).picks.tolist() == [50, 0]
    assert len(k_center_greedy(rows, radius=50, seeds=np.array([[50.0]])).picks) == 0


def test_copies_are_not_picked_and_no_rows_are_no_picks():
    assert k_center_greedy(np.ones((5, 3)), 4).picks.tolist() == [0]
    empty = k_center_greedy(np.zeros((0, 3)), 4)
    assert isinstance(empty, Cover)
    assert len(empty.picks) == 0


def test_numbers_that_are_not_finite_are_refused_by_their_rows():
    rows = np.zeros((9000, 2))
    rows[[3, 8000], [0, 1]] = [np.nan, np.inf]
    with pytest.raises(UserError, match=r"2 of 9000 are NaN or infinite, row 3, 8000"):
        k_center_greedy(rows, 2)
    with pytest.raises(UserError, match="row of the seeds 3, 8000"):
        k_center_greedy(rows[:3], 2, seeds=rows)
    with pytest.raises(UserError, match="too large"):
        k_center_greedy(np.array([[1e30], [-1e30]]), 1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be"):
        k_center_greedy(np.zeros((3, 2)), 1, seeds=np.zeros((3, 4)))


def test_k_means_finds_clusters_that_lie_apart():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 300)
    rows = 20 * rng.normal(size=(6, 5))[truth] + rng.normal(size=(300, 5))
    cluster = k_means(rows, 6, seed=1)
    assert len({(a, b) for a, b in zip(truth.tolist(), cluster.tolist(), strict=True)}) == 6
    assert k_means(rows, 6, seed=1).tolist() == cluster.tolist()
    assert set(k_means(np.ones((4, 2)), 3, seed=0).tolist()) == {0}
