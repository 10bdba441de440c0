"""The warning about weights near 0 names the setting that helps in the case at hand."""

import pytest

from dft.metrics.advice import advice_on_ratios, advice_on_weights
from dft.metrics.token_sums import TokenSums


def sums_of(below: float = 0.0, unlikely: float = 0.0, sure: float = 0.0, clipped: float = 0.0) -> list[float]:
    """Of 1000 tokens: shares of weights near 0, of tokens with p near 0 and near 1, and of clipped ratios."""
    sums = [0.0] * TokenSums.COUNT
    sums[TokenSums.SUPERVISED] = 1000.0
    shares = {"WEIGHT_BELOW": below, "P_BELOW": unlikely, "P_ABOVE": sure, "CLIPPED": clipped}
    for name, share in shares.items():
        sums[getattr(TokenSums, name)] = 1000 * share
    return sums


@pytest.mark.parametrize(
    ("objective", "sums", "named", "not_named"),
    [
        (
            "dft",
            sums_of(0.8, unlikely=0.8),
            ["80%", "dft_alpha (0.7)", "dft_floor", "special_tokens ce", "anchored"],
            [],
        ),
        ("anchored", sums_of(0.8, unlikely=0.8), ["dft_alpha (0.7)", "special_tokens ce"], ["dft_floor", "objective"]),
        ("chord", sums_of(0.7, sure=0.65), ["already sure", "65%", "chord passes over"], ["dft_alpha"]),
        ("threshold", sums_of(0.6, unlikely=0.2), ["Lower it (objective_args tau", "dft_floor"], ["special_tokens"]),
        ("prior", sums_of(0.6, unlikely=0.2), ["began with", "objective dft"], ["special_tokens"]),
        ("deft", sums_of(0.6, unlikely=0.2), ["hardly learned", "objective dft"], ["special_tokens"]),
    ],
)
def test_the_advice_fits_the_case(objective, sums, named, not_named):
    text = advice_on_weights(objective, sums)
    assert all(words in text for words in named), text
    assert not any(words in text for words in not_named), text


def test_half_of_the_tokens_may_have_no_weight():
    assert advice_on_weights("dft", sums_of(0.5, unlikely=0.9)) is None


def test_one_ratio_in_a_hundred_may_be_clipped():
    assert advice_on_ratios("anchored", sums_of(clipped=0.01)) is None
    assert "1.1% of the ratios" in advice_on_ratios("anchored", sums_of(clipped=0.011))
    assert "widen low and high" in advice_on_ratios("importance", sums_of(clipped=0.2))
