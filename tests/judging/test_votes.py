"""Votes: medians, the order undone, and how many are enough."""

import pytest

from dft.judging.votes import Vote, differs, median_scores, median_verdicts, valid_votes, vote_from_json


def scores(*values: int | None) -> list[Vote]:
    return [Vote("", i, None if value is None else {"right": value}) for i, value in enumerate(values)]


def verdicts(order: str, *values: str) -> list[Vote]:
    return [Vote(order, i, {"right": value}) for i, value in enumerate(values)]


def test_the_median_counts():
    """Rejects the mean, which one odd vote moves."""
    assert median_scores(scores(5, 1, 5), ["right"]) == {"right": 5.0}
    assert median_scores(scores(4, 5), ["right"]) == {"right": 4.5}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["first", "first", "second"], 1),
        (["second", "second", "tie"], -1),
        (["first", "tie", "tie"], 0),
        (["first", "tie", "second"], 0),
        (["first", "second"], 0),
        (["first", "tie"], 0),
        (["second", "tie"], 0),
        (["second"], -1),
    ],
)
def test_the_median_of_verdicts_in_both_orders(values, expected):
    """Rejects a swap that isn't undone: what is right for A first is right for B when B is first."""
    assert median_verdicts(verdicts("AB", *values), ["right"]) == {"right": expected}
    assert median_verdicts(verdicts("BA", *values), ["right"]) == {"right": -expected}


def test_more_than_half_must_be_valid():
    """Rejects a score from one vote of three, and a failure that counts as a score."""
    assert len(valid_votes(scores(4, None, 2))) == 2
    assert valid_votes(scores(4, None, None)) == []
    assert valid_votes(scores(4, None)) == []
    assert valid_votes([]) == []
    assert len(valid_votes(verdicts("AB", "tie") + [Vote("BA", 0, None)], "AB")) == 1
    assert valid_votes(verdicts("AB", "tie") + [Vote("BA", 0, None)], "BA") == []


def test_disagreement():
    assert differs(scores(4, 5, 4), "right")
    assert not differs(scores(4, 4), "right")


@pytest.mark.parametrize(
    "vote", [Vote("AB", 3, {"right": "tie"}, "so", "", "", 7, 0), Vote("", 0, None, "", "timeout", "60 s")]
)
def test_a_vote_is_read_as_it_was_written(vote):
    assert vote_from_json(vote.as_json()) == vote
