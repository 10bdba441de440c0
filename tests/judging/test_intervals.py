"""Intervals against published values, exact coverage, and the cases in which others have no width."""

import math

import pytest

from dft.judging.intervals import Z, mean_estimate, sign_test, t_quantile, win_rate


def wilson(wins: int, pairs: int) -> tuple[float, float]:
    middle = (wins + Z * Z / 2) / (pairs + Z * Z)
    half = Z / (pairs + Z * Z) * math.sqrt(wins * (pairs - wins) / pairs + Z * Z / 4)
    return middle - half, middle + half


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_of_students_distribution(degrees, expected):
    """Against the printed tables; rejects the normal quantile, and an exchange of odd and even degrees."""
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-5)


def test_quantiles_go_over_into_the_normal_one():
    assert t_quantile(1000) == pytest.approx(t_quantile(1001), rel=0.0013)


def test_the_interval_of_a_mean():
    """Rejects the standard deviation of the population, n degrees of freedom, and a missing root of n."""
    found = mean_estimate([1, 2, 3, 4], 0, 9)
    half = 3.18245 * math.sqrt(5 / 3) / 2
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-5)


def test_the_interval_of_a_mean_stays_on_the_scale():
    found = mean_estimate([1, 5], 1, 5)
    assert (found.low, found.high) == (1, 5)


@pytest.mark.parametrize("values", [[4.0], [4.0, 4.0, 4.0]])
def test_equal_values_have_no_interval(values):
    """Rejects an interval of no width, which would promise that all others are equal too."""
    found = mean_estimate(values, 1, 5)
    assert (found.value, found.low, found.high) == (4.0, None, None)


def test_the_published_example():
    """Airway hyper-responsiveness of 21 children, 1 and 7 discordant pairs: −0.286, (−0.517, −0.026).

    M. Fagerland, S. Lydersen and P. Laake, Recommended tests and confidence intervals for paired binomial proportions,
    Statistics in Medicine 33 (2014).
    """
    found = win_rate(1, 7, 21)
    delta = [round(2 * value - 1, 3) for value in (found.value, found.low, found.high)]
    assert delta == [-0.286, -0.517, -0.026]


@pytest.mark.parametrize(("wins", "pairs"), [(7, 10), (1, 30), (0, 5), (5, 5), (50, 100)])
def test_without_ties_it_is_wilsons(wins, pairs):
    found = win_rate(wins, pairs - wins, pairs)
    assert (found.low, found.high) == pytest.approx(wilson(wins, pairs), abs=1e-9)


@pytest.mark.parametrize(("wins", "losses", "pairs"), [(3, 1, 9), (0, 0, 4), (4, 0, 4), (0, 2, 7)])
def test_exchanging_the_models_mirrors_the_interval(wins, losses, pairs):
    one, other = win_rate(wins, losses, pairs), win_rate(losses, wins, pairs)
    assert (one.value, one.low, one.high) == pytest.approx((1 - other.value, 1 - other.high, 1 - other.low))
    assert 0 <= one.low < one.value or one.value == 0
    assert one.value < one.high <= 1 or one.value == 1


def test_ties_narrow_the_interval():
    """Rejects Wilson's interval of the rate with ties as halves, which is as wide as if they were decided."""
    tied, decided = win_rate(10, 10, 100), win_rate(50, 50, 100)
    assert tied.high - tied.low < 0.5 * (decided.high - decided.low)


@pytest.mark.parametrize(("p_win", "p_loss"), [(0.4, 0.3), (0.1, 0.05), (0.8, 0.1), (0.5, 0.5), (0.3, 0.0)])
def test_the_interval_covers_the_true_rate(p_win, p_loss):
    """Exactly, over all outcomes of 20 pairs; rejects one of the decided pairs alone, and one by their spread."""
    pairs, covered = 20, 0.0
    for wins in range(pairs + 1):
        for losses in range(pairs - wins + 1):
            ties = pairs - wins - losses
            ways = math.comb(pairs, wins) * math.comb(pairs - wins, losses)
            found = win_rate(wins, losses, pairs)
            if found.low <= (1 + p_win - p_loss) / 2 <= found.high:
                covered += ways * p_win**wins * p_loss**losses * (1 - p_win - p_loss) ** ties
    assert covered >= 0.93


def test_the_sign_test():
    """8 pairs of which 7 are won: 2·(1 + 8)/256; rejects one side alone, and ties that count."""
    assert sign_test(7, 1) == sign_test(1, 7) == pytest.approx(18 / 256)
    assert sign_test(0, 0) == sign_test(4, 4) == 1.0
    assert sign_test(3000, 0) < 1e-300
