"""One run of a judge: what was judged before stays, the rest is asked, and both make the report."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from dft.data.names import file_labels
from dft.errors import StoppedEarly, UserError
from dft.judging import comparison, scores
from dft.judging.answers import load_answers, pair_answers, repeated_prompts
from dft.judging.asking import COMPARE, FAILED_STATUS, SCORE, Question, ask_all
from dft.judging.costs import Costs
from dft.judging.endpoint import Endpoint
from dft.judging.flags import Settings, settings_of
from dft.judging.judgments import Judgments
from dft.judging.votes import Vote, valid_votes
from dft.printable import printable

logger = logging.getLogger(__name__)

INTERRUPTED_STATUS = 130

Describe = Callable[[Question, list[Vote]], dict[str, Any]]


def score(args: argparse.Namespace) -> None:
    """Scores the answers of a file, and prints the report.

    Raises:
        UserError: a flag, a file or the server can't be used; nothing has been asked then.
        StoppedEarly: the server has gone, or too many requests have failed.
    """
    settings = settings_of(args, SCORE, [args.answers])
    rubric = settings.poll.rubric
    answers = load_answers(args.answers)
    repeated = repeated_prompts(answers)
    if repeated:
        logger.warning(
            "%d rows have the prompt of an earlier row: the intervals, which take rows as independent, are too narrow",
            repeated,
        )
    questions = [_question(settings, scores.case_of(answer)) for answer in answers]
    answer_of = {question.key: answer for question, answer in zip(questions, answers, strict=True)}

    def describe(question: Question, votes: list[Vote]) -> dict[str, Any]:
        return scores.describe(scores.score_row(answer_of[question.key], votes, rubric))

    votes, costs = collect(questions, settings, describe)
    rows = [scores.score_row(a, votes[q.key], rubric) for a, q in zip(answers, questions, strict=True)]
    report = scores.make_report(rows, rubric)
    conclude(report, scores.table(report), costs, settings)


def compare(args: argparse.Namespace) -> None:
    """Compares the answers of two files, and prints the report.

    Raises:
        UserError: a flag, a file or the server can't be used; nothing has been asked then.
        StoppedEarly: the server has gone, or too many requests have failed.
    """
    settings = settings_of(args, COMPARE, [args.answers_a, args.answers_b])
    rubric = settings.poll.rubric
    pairs, unpaired = pair_answers(load_answers(args.answers_a), load_answers(args.answers_b))
    questions = [_question(settings, comparison.cases_of(pair)) for pair in pairs]
    pair_of = {question.key: pair for question, pair in zip(questions, pairs, strict=True)}

    def describe(question: Question, votes: list[Vote]) -> dict[str, Any]:
        return comparison.describe(comparison.compare_pair(pair_of[question.key], votes, rubric), rubric)

    votes, costs = collect(questions, settings, describe)
    rows = [comparison.compare_pair(p, votes.get(q.key, []), rubric) for p, q in zip(pairs, questions, strict=True)]
    report = comparison.make_report(rows, unpaired, rubric)
    names = file_labels([str(args.answers_a), str(args.answers_b)])
    conclude(report, comparison.table(report, *names), costs, settings)


def _question(settings: Settings, cases: dict[str, Any]) -> Question:
    fields = settings.endpoint.request_fields(seed=0)
    return settings.poll.question(cases, {"model": settings.endpoint.model, **fields})


def collect(
    questions: Sequence[Question], settings: Settings, describe: Describe
) -> tuple[dict[str, list[Vote]], Costs]:
    """The votes on each question by its key, from the output of earlier runs or from the judge, and what they cost.

    Questions that are the same are asked once. One that was asked before is asked again if too few of its votes are
    valid.

    Args:
        describe: what the output says of a question beside its votes.

    Raises:
        UserError: the output or the server can't be used; nothing has been asked then.
        StoppedEarly: the server has gone; what was judged is in the output.
    """
    judgments = Judgments(settings.output)
    missing = {q.key: q for q in questions if not is_judged(q, judgments.votes.get(q.key, []))}
    others = len(judgments.votes.keys() - {question.key for question in questions})
    if others:
        logger.info("%d rows of the output are of other answers or settings: they stay, and don't count", others)
    costs = Costs()
    if not missing:
        return judgments.votes, costs
    endpoint = Endpoint(settings.endpoint)
    endpoint.probe()
    poll = settings.poll
    about = {"kind": poll.form.name, "model": settings.endpoint.model, "rubric": poll.rubric.digest}
    try:
        with tqdm(desc="Judging", total=len(missing), unit="row", disable=not sys.stderr.isatty()) as bar:
            for question, votes in ask_all(list(missing.values()), poll, endpoint.ask, costs.add):
                judgments.add(question.key, about | describe(question, votes), votes)
                bar.update()
    except StoppedEarly as error:
        raise StoppedEarly(f"{error}; {_what_is_kept(costs, settings)}", error.status) from error
    except KeyboardInterrupt:
        raise StoppedEarly(f"interrupted; {_what_is_kept(costs, settings)}", INTERRUPTED_STATUS) from None
    return judgments.votes, costs


def is_judged(question: Question, votes: Sequence[Vote]) -> bool:
    """Whether enough votes on a question are valid, in each order."""
    return all(valid_votes(votes, order) for order in question.cases)


def _what_is_kept(costs: Costs, settings: Settings) -> str:
    kept = "without --output nothing is kept"
    if settings.output is not None:
        kept = f"what was judged is in {printable(settings.output)}, and the same command goes on from there"
    return "\n".join([kept, *costs.lines(settings.prices)])


def conclude(report: dict[str, Any], lines: list[str], costs: Costs, settings: Settings) -> None:
    """Prints the report, and writes it.

    Raises:
        UserError: the report can't be written.
        StoppedEarly: more requests have failed than may, with the status 1.
    """
    spent = costs.lines(settings.prices) if costs.requests else ["nothing had to be asked"]
    print("\n".join([*lines, *spent]))
    about = {
        "model": settings.endpoint.model,
        "rubric": settings.poll.rubric.digest,
        "votes": settings.poll.votes,
        **report,
        "requests": costs.as_json(settings.prices),
    }
    if settings.report is not None:
        try:
            settings.report.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--report {printable(settings.report)} can't be written: {error.strerror}") from error
    if costs.failed_share > settings.max_failed:
        raise StoppedEarly(
            f"{costs.failed_share:.1%} of the requests failed, more than --max_failed {settings.max_failed:g}: the "
            "results above are of the others alone",
            FAILED_STATUS,
        )
