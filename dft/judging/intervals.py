"""Confidence intervals of 95 % for means of scores and for win rates, and the sign test.

They say how much the prompts at hand may differ from others like them; they know nothing of what a judge gets wrong.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
MANY = 1000  # degrees of freedom above which the normal quantile is taken, which is 0.12 % less or nearer
HALVINGS = 100  # of an interval that a root lies in: more than a float has digits


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Args:
        low, high: None where the data say nothing of the spread.
    """

    value: float
    low: float | None
    high: float | None


def mean_estimate(values: Sequence[float], lowest: float, highest: float) -> Estimate:
    """The mean of independent values, with the interval of Student's t, cut at the ends of the scale.

        mean ± t · s / √n          t: quantile of n − 1 degrees of freedom, s: standard deviation of the sample

    There is no interval for one value, nor for equal ones, of which s would be 0.

    Args:
        values: [n], n ≥ 1.
    """
    mean = fmean(values)
    spread = stdev(values) if len(values) > 1 else 0.0
    if spread == 0:
        return Estimate(mean, None, None)
    half = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return Estimate(mean, max(lowest, mean - half), min(highest, mean + half))


def t_quantile(degrees: int) -> float:
    """The t that Student's distribution of so many degrees of freedom exceeds in absolute value with 5 %."""
    if degrees > MANY:
        return Z
    return _root(lambda t: LEVEL - _within(t, degrees), 0.0, 1e4)


def _within(t: float, degrees: int) -> float:
    """P(−t < T < t), by the finite series of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3–4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    is_odd = degrees % 2
    term, series = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for k in range(1 + is_odd, degrees, 2):
        series += term
        term *= cosine**2 * k / (k + 1)
    series *= math.sin(angle)
    return 2 / math.pi * (angle + series) if is_odd else series


def win_rate(wins: int, losses: int, pairs: int) -> Estimate:
    """The share of pairs that A wins, ties counted half, with its score interval (Tango, 1998).

        rate = (1 + δ)/2          δ = (wins − losses) / pairs

    δ is a difference of paired proportions. Its interval holds every δ for which

        |wins − losses − pairs·δ| / √(pairs·(2q + δ(1 − δ))) ≤ 1.96

    q being the likeliest share of losses given δ: the larger root of 2n·q² + B·q − losses·δ(1 − δ) = 0 with
    B = (2n − wins + losses)·δ − wins − losses and n pairs. Without ties it is Wilson's interval. Unlike an interval
    by the outcomes' own spread, it has a width even where all outcomes are the same.

    Source: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design, Statistics in Medicine 17 (1998), 891–908.

    Args:
        pairs: n ≥ 1, ties included.
    """

    def statistic(delta: float) -> float:
        b = (2 * pairs - wins + losses) * delta - wins - losses
        c = -losses * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * pairs * c)) - b) / (4 * pairs)
        variance = pairs * (2 * q + delta * (1 - delta))
        distance = wins - losses - pairs * delta
        # at the ends of the range the variance vanishes, and rounding may make it negative
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, distance)

    delta = (wins - losses) / pairs
    low = -1.0 if losses == pairs else _root(lambda d: statistic(d) - Z, -1.0, delta)
    high = 1.0 if wins == pairs else _root(lambda d: statistic(d) + Z, delta, 1.0)
    return Estimate((1 + delta) / 2, (1 + low) / 2, (1 + high) / 2)


def sign_test(wins: int, losses: int) -> float:
    """The probability that a fair coin gives a result as lopsided, ties left out; 1 where all pairs are ties."""
    decided = wins + losses
    tail = sum(math.comb(decided, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**decided)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls from above 0 to below it crosses 0."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
