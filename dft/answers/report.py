"""Answers for people: the table of the sources, and sample answers."""

from collections.abc import Sequence
from typing import Any

from dft.answers.asking import Answer, averages_of, groups_of
from dft.answers.questions import Questions
from dft.data.tables import aligned
from dft.printable import printable

NUM_SAMPLES = 3
SHOWN_CHARACTERS = 300  # of a text
SHOWN_REFUSALS = 5


def answers_table(answers: Sequence[Answer]) -> list[str]:
    """The lines of a table: the scores of all answers, and of each source by each of its scorers."""
    lines = [("answers", "scored by", "rows", "score", "ended", "mean tokens")]
    groups = {("all", ""): list(answers), **groups_of(answers)}
    for (source, scorer), some in groups.items():
        found = averages_of(some)
        numbers = (f"{len(some):,}", f"{found['score']:.4f}", f"{found['ended']:.4f}", f"{found['mean_tokens']:.1f}")
        lines.append((printable(source), printable(scorer), *numbers))
    return aligned(lines, num_left=2)


def refusal_lines(questions: Questions) -> list[str]:
    """What to say of the rows that can't be asked; nothing where all can."""
    refusals = questions.refusals
    if not refusals:
        return []
    total = len(refusals) + len(questions.questions)
    more = len(refusals) - SHOWN_REFUSALS
    shown = [f"  {printable(place)}: {printable(error.detail)}" for place, error in refusals[:SHOWN_REFUSALS]]
    return [
        f"{len(refusals):,} of the {total:,} chosen rows can't be asked:",
        *shown,
        *([f"  and {more:,} more"] if more > 0 else []),
    ]


def choose_samples(answers: Sequence[Any], count: int = NUM_SAMPLES) -> list[Any]:
    """At most `count` of the answers, spread evenly: the same ones in each evaluation of the same questions."""
    count = min(count, len(answers))
    return [answers[i * len(answers) // count] for i in range(count)]


def sample_lines(answers: Sequence[Answer]) -> list[str]:
    """A block of sample answers, each with its question and its reference."""
    lines = []
    for answer in choose_samples(answers):
        question = answer.question
        ended = "" if answer.has_ended else ", cut off"
        verdict = f"{'right' if answer.is_right else 'wrong'} by {printable(question.scorer.name)}{ended}"
        lines += [
            f"{printable(question.place)} ({verdict})",
            f"  question   {shortened(question.asked)}",
            f"  reference  {shortened(question.reference)}",
            f"  answer     {shortened(answer.text)}",
        ]
    return lines


def shortened(text: str) -> str:
    """A text on one line, cut where it is long."""
    text = text.strip()
    cut = text[:SHOWN_CHARACTERS]
    return printable(cut) + (" …" if len(text) > len(cut) else "")
