"""Comparisons: both orders, the weights, what a position bias makes of them, and the report."""

import pytest

from dft.judging.answers import Answer, Pair
from dft.judging.comparison import cases_of, compare_pair, describe, make_report, table
from dft.judging.intervals import win_rate
from dft.judging.votes import Vote


def pair(line: int = 1, channel: str = "") -> Pair:
    prompt = ({"role": "user", "content": "?"},)
    return Pair(*(Answer(prompt, name, None, channel, f"{name}.jsonl", line) for name in "ab"))


def votes(ab: str | None, ba: str | None, brief: tuple[str, str] = ("tie", "tie"), times: int = 3) -> list[Vote]:
    """So many equal votes in both orders: on the criterion right, and on brief."""
    return [
        Vote(order, seed, None if right is None else {"right": right, "brief": other})
        for order, right, other in (("AB", ab, brief[0]), ("BA", ba, brief[1]))
        for seed in range(times)
    ]


@pytest.mark.parametrize(
    ("ab", "ba", "expected"),
    [
        ("first", "second", 1),
        ("second", "first", -1),
        ("first", "first", 0),
        ("second", "second", 0),
        ("first", "tie", 0),
        ("tie", "second", 0),
        ("tie", "tie", 0),
    ],
)
def test_a_win_needs_both_orders(rubric, ab, ba, expected):
    """Rejects an order that isn't undone, and a win in one order alone."""
    row = compare_pair(pair(), votes(ab, ba), rubric)
    assert (row.verdict("right"), row.verdict("overall")) == (expected, expected)


def test_a_judge_that_prefers_a_place_gives_ties(rubric):
    """Rejects an order that isn't undone: A would win all, or none."""
    rows = [compare_pair(pair(line), votes("first", "first"), rubric) for line in range(10)]
    report = make_report(rows, [], rubric)
    assert report["results"]["overall"]["ties"] == 10
    assert report["results"]["overall"]["value"] == 0.5
    assert report["verdicts_by_place"] == {"first": 60, "tie": 0, "second": 0}
    assert report["orders_disagree"] == 10


def test_the_weights_decide(rubric):
    """right weighs 3, brief 1; rejects a count of criteria, and weights that the overall verdict ignores."""
    row = compare_pair(pair(), votes("first", "second", ("second", "first")), rubric)
    assert (row.verdict("right"), row.verdict("brief"), row.verdict("overall")) == (1, -1, 1)
    row = compare_pair(pair(), votes("tie", "tie", ("second", "first")), rubric)
    assert (row.verdict("right"), row.verdict("brief"), row.verdict("overall")) == (0, -1, -1)


def test_too_few_votes_of_one_order_are_no_verdict(rubric):
    row = compare_pair(pair(), votes("first", None), rubric)
    assert not row.is_judged
    assert describe(row, rubric)["verdicts"] is None


def test_the_report(rubric):
    """Wins, ties, losses, and the votes by place: 3 × (2 + 0 + 2) for the first."""
    rows = [
        compare_pair(pair(1, "x"), votes("first", "second"), rubric),
        compare_pair(pair(2, "x"), votes("second", "first"), rubric),
        compare_pair(pair(3, "y"), votes("first", "second"), rubric),
        compare_pair(pair(4, "y"), votes("first", "first"), rubric),
        compare_pair(pair(5, "y"), votes(None, "first"), rubric),
    ]
    report = make_report(rows, [pair(9).a], rubric)
    overall = report["results"]["overall"]
    assert (report["pairs"], report["judged"]) == (5, 4)
    assert (overall["wins"], overall["ties"], overall["losses"]) == (2, 1, 1)
    expected = win_rate(2, 1, 4)
    assert (overall["value"], overall["low"], overall["high"]) == (0.625, expected.low, expected.high)
    assert report["results"]["brief"]["ties"] == 4
    assert report["verdicts_by_place"] == {"first": 15, "tie": 0, "second": 9}
    assert report["orders_disagree"] == 1
    assert {name: group["results"]["overall"]["value"] for name, group in report["channels"].items()} == {
        "x": 0.5,
        "y": 0.75,
    }
    assert (report["unpaired"], report["pairs_without_verdict"]) == (["a.jsonl:9"], ["a.jsonl:5"])
    text = "\n".join(table(report, "a.jsonl", "b.jsonl"))
    assert "A: a.jsonl\nB: b.jsonl" in text
    assert "4 of 5 pairs have a verdict. Ties are 0 with the same answer twice, and 1 on which the two orders" in text
    assert "15 are for the first and 9 for the second (62%; without a bias 50%)" in text
    assert "1 without a partner: a.jsonl:9" in text
    assert "1 without a verdict: a.jsonl:5" in text


def test_the_same_answer_twice_is_a_tie_without_a_question(rubric):
    same = Pair(pair().a, pair().a)
    assert cases_of(same) == {}
    rows = [compare_pair(same, [], rubric), compare_pair(pair(), votes("first", "second"), rubric)]
    report = make_report(rows, [], rubric)
    assert (report["results"]["overall"]["value"], report["same_answers"], report["orders_disagree"]) == (0.75, 1, 0)


def test_what_the_output_says(rubric):
    said = describe(compare_pair(pair(3, "x"), votes("first", "second", ("second", "first")), rubric), rubric)
    assert said == {
        "path_a": "a.jsonl", "line_a": 3, "path_b": "b.jsonl", "line_b": 3, "channel": "x",
        "verdicts": {"right": "A", "brief": "B", "overall": "A"},
    }  # fmt: skip


def test_ties_alone_and_no_verdicts(rubric):
    report = make_report([compare_pair(pair(), votes("tie", "tie"), rubric)], [], rubric)
    text = "\n".join(table(report, "a", "b"))
    assert "0 are for the first and 0 for the second\n" in text
    assert "p = 1" in text
    report = make_report([compare_pair(pair(), votes(None, None), rubric)], [], rubric)
    assert table(report, "a", "b")[-1] == "none of 1 pairs has a verdict"
