"""Scores of rows: medians, weights, means over rows and channels, and what failed."""

import pytest

from dft.judging.answers import Answer
from dft.judging.scores import make_report, score_row, table
from dft.judging.votes import Vote


def answer(line: int, channel: str = "") -> Answer:
    return Answer(({"role": "user", "content": "?"},), "!", None, channel, "a.jsonl", line)


def votes(*scores: tuple[int, int] | None) -> list[Vote]:
    return [Vote("", i, None if s is None else {"right": s[0], "brief": s[1]}) for i, s in enumerate(scores)]


def test_a_row_has_the_medians_and_their_weighted_mean(rubric):
    """3 × 4 + 1 × 2 over 4; rejects the mean of the votes' totals."""
    row = score_row(answer(1), votes((4, 1), (5, 2), (1, 5)), rubric)
    assert row.scores == {"right": 4.0, "brief": 2.0, "total": 3.5}


def test_too_few_votes_are_no_score(rubric):
    assert score_row(answer(1), votes((5, 5), None, None), rubric).scores is None
    assert score_row(answer(1), votes((5, 5), (5, 5), None), rubric).scores["total"] == 5.0


def test_the_report(rubric):
    rows = [
        score_row(answer(1, "x"), votes((4, 1), (4, 2), (4, 1)), rubric),
        score_row(answer(2, "y"), votes((2, 3), (2, 3), None), rubric),
        score_row(answer(3, "x"), votes((5, 5), None, None), rubric),
    ]
    report = make_report(rows, rubric)
    assert (report["rows"], report["scored"], report["rows_without_scores"]) == (3, 2, ["a.jsonl:3"])
    assert report["scores"]["right"]["value"] == 3.0
    assert report["scores"]["right"]["votes_differ"] == 0.0
    assert report["scores"]["brief"]["votes_differ"] == 0.5
    assert report["scores"]["total"]["value"] == pytest.approx(((12 + 1) / 4 + (6 + 3) / 4) / 2)
    assert (report["scores"]["right"]["low"], report["scores"]["right"]["high"]) == (1, 5)  # t is wide for two rows
    assert {name: (g["rows"], g["scored"]) for name, g in report["channels"].items()} == {"x": (2, 1), "y": (1, 1)}
    assert report["channels"]["x"]["scores"]["total"] == {"value": 3.25, "low": None, "high": None}
    text = "\n".join(table(report))
    assert "2 of 3 rows have scores" in text
    assert "without: a.jsonl:3" in text


def test_a_report_without_channels_or_scores(rubric):
    rows = [score_row(answer(1), votes((4, 1)), rubric)]
    assert "channel" not in "\n".join(table(make_report(rows, rubric)))
    rows = [score_row(answer(1, "x"), votes(None), rubric), score_row(answer(2, "y"), votes(None), rubric)]
    assert table(make_report(rows, rubric)) == ["none of 2 rows has scores"]
    rows.append(score_row(answer(3, "\x1b[2J"), votes((4, 1)), rubric))
    lines = table(make_report(rows, rubric))
    assert any(line.split() == ["x", "0", "–", "–", "–", "–"] for line in lines)
    assert "\x1b" not in "".join(lines)
