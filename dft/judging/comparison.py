"""Comparisons of two models: who wins each pair of answers, and the report over all pairs and each channel.

Every pair is judged in both orders, and a win in one of them alone is a tie: the conservative way of Zheng et al.,
Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena (2023), https://arxiv.org/abs/2306.05685, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dft.data.tables import aligned
from dft.judging.answers import Answer, Pair, by_channel
from dft.judging.intervals import sign_test, win_rate
from dft.judging.prompts import Case
from dft.judging.rubric import Rubric
from dft.judging.votes import Vote, median_verdicts, preference, valid_votes
from dft.printable import printable

AB, BA = "AB", "BA"
ORDERS = (AB, BA)
OVERALL = "overall"
WINNERS = {1: "A", 0: "tie", -1: "B"}
SHOWN_PAIRS = 5
TIE_MARGIN = 1e-9  # of weighted verdicts: what rounding leaves where they cancel


@dataclass(frozen=True)
class ComparedPair:
    """One pair with its verdicts.

    Args:
        votes: the valid ones.
        in_order: {order: {criterion: 1 for A, -1 for B, 0 for a tie}}, with OVERALL; empty where too few votes of an
            order are valid.
    """

    pair: Pair
    votes: list[Vote]
    in_order: dict[str, dict[str, int]]

    @property
    def is_judged(self) -> bool:
        return bool(self.in_order)

    def verdict(self, name: str) -> int:
        """The verdict of both orders, which is a tie unless they agree."""
        one, other = (self.in_order[order][name] for order in ORDERS)
        return one if one == other else 0


def cases_of(pair: Pair) -> dict[str, Case]:
    """What is asked about a pair: see Question. Nothing where both answers are the same, which is a tie."""
    return {order: pair.case(order) for order in ORDERS if not pair.is_same}


def compare_pair(pair: Pair, votes: Sequence[Vote], rubric: Rubric) -> ComparedPair:
    """The verdicts on a pair by the votes on it: the median of each order, and the sign of their weighted sum."""
    if pair.is_same:
        return ComparedPair(pair, [], dict.fromkeys(ORDERS, dict.fromkeys((*rubric.names, OVERALL), 0)))
    valid = {order: valid_votes(votes, order) for order in ORDERS}
    if not all(valid.values()):
        return ComparedPair(pair, [], {})
    in_order = {}
    for order, chosen in valid.items():
        verdicts = median_verdicts(chosen, rubric.names)
        in_order[order] = verdicts | {OVERALL: _overall(verdicts, rubric)}
    return ComparedPair(pair, [*valid[AB], *valid[BA]], in_order)


def _overall(verdicts: dict[str, int], rubric: Rubric) -> int:
    margin = rubric.weighted(verdicts)
    return 0 if abs(margin) < TIE_MARGIN else 1 if margin > 0 else -1


def describe(row: ComparedPair, rubric: Rubric) -> dict[str, Any]:
    """What the output says of a pair beside its votes."""
    a, b = row.pair.a, row.pair.b
    names = (*rubric.names, OVERALL) if row.is_judged else ()
    verdicts = {name: WINNERS[row.verdict(name)] for name in names}
    return {
        "path_a": a.path,
        "line_a": a.line,
        "path_b": b.path,
        "line_b": b.line,
        "channel": row.pair.channel,
        "verdicts": verdicts or None,
    }


def make_report(rows: Sequence[ComparedPair], unpaired: Sequence[Answer], rubric: Rubric) -> dict[str, Any]:
    """Wins, ties, losses and the win rate of A over the pairs with verdicts; of each channel too, if there are any."""
    judged = [row for row in rows if row.is_judged]
    groups = by_channel(rows, lambda row: row.pair.channel)
    return {
        **_group_report(rows, rubric),
        "weights": {criterion.name: criterion.weight for criterion in rubric.criteria},
        "channels": {name: _group_report(group, rubric) for name, group in groups.items()},
        "same_answers": sum(row.pair.is_same for row in rows),
        "orders_disagree": sum(row.in_order[AB][OVERALL] != row.in_order[BA][OVERALL] for row in judged),
        "verdicts_by_place": _by_place(judged, rubric),
        "unpaired": [answer.place for answer in unpaired],
        "pairs_without_verdict": [row.pair.a.place for row in rows if not row.is_judged],
    }


def _group_report(rows: Sequence[ComparedPair], rubric: Rubric) -> dict[str, Any]:
    judged = [row for row in rows if row.is_judged]
    report: dict[str, Any] = {"pairs": len(rows), "judged": len(judged), "results": {}}
    for name in (OVERALL, *rubric.names) if judged else ():
        verdicts = [row.verdict(name) for row in judged]
        wins, losses = verdicts.count(1), verdicts.count(-1)
        report["results"][name] = {
            "wins": wins,
            "ties": len(judged) - wins - losses,
            "losses": losses,
            **asdict(win_rate(wins, losses, len(judged))),
            "sign_test": sign_test(wins, losses),
        }
    return report


def _by_place(judged: Sequence[ComparedPair], rubric: Rubric) -> dict[str, int]:
    """How many votes prefer the answer that came first, and the second, all criteria by their weights."""
    counts = {"first": 0, "tie": 0, "second": 0}
    for row in judged:
        for vote in row.votes:
            prefers = _overall({name: preference(vote, name) for name in rubric.names}, rubric)
            by_place = prefers if vote.order == AB else -prefers
            counts[{1: "first", 0: "tie", -1: "second"}[by_place]] += 1
    return counts


def table(report: dict[str, Any], a: str, b: str) -> list[str]:
    """The report as lines for the console.

    Args:
        a, b: names of the files.
    """
    lines = [f"A: {a}", f"B: {b}", ""]
    if not report["judged"]:
        return [*lines, f"none of {report['pairs']:,} pairs has a verdict"]
    lines += _results(report["results"], "")
    if report["channels"]:
        of_channels = {
            printable(name) or "(none)": group["results"][OVERALL]
            for name, group in report["channels"].items()
            if group["judged"]
        }
        lines += ["", *_results(of_channels, "channel, overall")]
    return [*lines, "", *_remarks(report)]


def _results(entries: dict[str, dict[str, Any]], head: str) -> list[str]:
    cells = [(head, "A wins", "ties", "B wins", "win rate of A", "95% interval")]
    for name, entry in entries.items():
        counts = (f"{entry[key]:,}" for key in ("wins", "ties", "losses"))
        between = f"{entry['low']:.1%} to {entry['high']:.1%}"
        cells.append((name, *counts, f"{entry['value']:.1%}", between))
    return aligned(cells, num_left=1)


def _remarks(report: dict[str, Any]) -> list[str]:
    first, second = (report["verdicts_by_place"][place] for place in ("first", "second"))
    share = f" ({first / (first + second):.0%}; without a bias 50%)" if first + second else ""
    lines = [
        f"{report['judged']:,} of {report['pairs']:,} pairs have a verdict. Ties are {report['same_answers']:,} with "
        f"the same answer twice, and {report['orders_disagree']:,} on which the two orders disagree",
        f"of the votes for one answer, {first:,} are for the first and {second:,} for the second{share}",
        f"sign test of the pairs that one side wins: p = {report['results'][OVERALL]['sign_test']:.2g}",
    ]
    for key, what in (("pairs_without_verdict", "without a verdict"), ("unpaired", "without a partner")):
        if report[key]:
            more = ", …" if len(report[key]) > SHOWN_PAIRS else ""
            lines.append(f"{len(report[key]):,} {what}: {', '.join(report[key][:SHOWN_PAIRS])}{more}")
    return lines
