"""Rubric scores of answers: the question for each row, and the report over all of them and each channel."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dft.data.tables import aligned
from dft.judging.answers import Answer, by_channel
from dft.judging.intervals import Estimate, mean_estimate
from dft.judging.prompts import Case
from dft.judging.rubric import HIGHEST, LOWEST, Rubric
from dft.judging.votes import Vote, differs, median_scores, valid_votes
from dft.printable import printable

TOTAL = "total"
SHOWN_ROWS = 5


@dataclass(frozen=True)
class ScoredRow:
    """One answer with its scores.

    Args:
        scores: {criterion: median of the votes}, and the total; None where too few votes are valid.
    """

    answer: Answer
    votes: list[Vote]
    scores: dict[str, float] | None


def case_of(answer: Answer) -> dict[str, Case]:
    """What is asked about an answer: see Question."""
    return {"": Case(answer.prompt, (answer.answer,), answer.reference)}


def score_row(answer: Answer, votes: Sequence[Vote], rubric: Rubric) -> ScoredRow:
    """The scores of an answer by the votes on it."""
    valid = valid_votes(votes)
    if not valid:
        return ScoredRow(answer, valid, None)
    scores = median_scores(valid, rubric.names)
    return ScoredRow(answer, valid, scores | {TOTAL: rubric.weighted(scores)})


def describe(row: ScoredRow) -> dict[str, Any]:
    """What the output says of a row beside its votes."""
    answer = row.answer
    return {"path": answer.path, "line": answer.line, "channel": answer.channel, "scores": row.scores}


def make_report(rows: Sequence[ScoredRow], rubric: Rubric) -> dict[str, Any]:
    """The means with their intervals over the rows that have scores; of each channel too, where there are any."""
    groups = by_channel(rows, lambda row: row.answer.channel)
    return {
        **_group_report(rows, rubric),
        "weights": {criterion.name: criterion.weight for criterion in rubric.criteria},
        "channels": {name: _group_report(group, rubric) for name, group in groups.items()},
        "rows_without_scores": [row.answer.place for row in rows if row.scores is None],
    }


def _group_report(rows: Sequence[ScoredRow], rubric: Rubric) -> dict[str, Any]:
    scored = [row for row in rows if row.scores is not None]
    report: dict[str, Any] = {"rows": len(rows), "scored": len(scored), "scores": {}}
    for name in (*rubric.names, TOTAL) if scored else ():
        report["scores"][name] = asdict(mean_estimate([row.scores[name] for row in scored], LOWEST, HIGHEST))
        if name != TOTAL:
            report["scores"][name]["votes_differ"] = sum(differs(row.votes, name) for row in scored) / len(scored)
    return report


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines for the console."""
    if not report["scored"]:
        return [f"none of {report['rows']:,} rows has scores"]
    cells = [("", "weight", "mean", "95% interval", "votes differ")]
    for name, entry in report["scores"].items():
        weight = "" if name == TOTAL else f"{report['weights'][name]:g}"
        differ = "" if name == TOTAL else f"{entry['votes_differ']:.0%}"
        cells.append((name, weight, f"{entry['value']:.2f}", interval(entry), differ))
    lines = aligned(cells, num_left=1)
    if report["channels"]:
        names = list(report["scores"])
        cells = [("channel", "rows", *names, "95% interval of it")]
        for channel, group in report["channels"].items():
            values = [f"{group['scores'][name]['value']:.2f}" if group["scored"] else "–" for name in names]
            last = interval(group["scores"][TOTAL]) if group["scored"] else "–"
            cells.append((printable(channel) or "(none)", f"{group['scored']:,}", *values, last))
        lines += ["", *aligned(cells, num_left=1)]
    lines += ["", f"{report['scored']:,} of {report['rows']:,} rows have scores, from {LOWEST} to {HIGHEST}"]
    without = report["rows_without_scores"]
    if without:
        more = ", …" if len(without) > SHOWN_ROWS else ""
        lines.append(f"without: {', '.join(without[:SHOWN_ROWS])}{more}")
    return lines


def interval(entry: dict[str, Any]) -> str:
    """The interval of a mean; a dash where there is none."""
    estimate = Estimate(entry["value"], entry["low"], entry["high"])
    return "–" if estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"
