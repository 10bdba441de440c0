"""Settings of the evaluation by answers: how many prompts, how long answers, and how they are compared."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from dft.config.options import did_you_mean, option
from dft.errors import UserError
from dft.printable import printable

ScorerName = Literal["auto", "exact", "last_number", "json", "tool_call"]
SCORER_NAMES: tuple[str, ...] = get_args(ScorerName)
REGEX = "regex:"  # and the pattern
AUTO = "auto"


@dataclass(frozen=True)
class AnswersConfig:
    """Which held-out prompts a model answers in an evaluation, and how its answers are scored.

    Raises:
        UserError: a value outside its range.
    """

    _argument_group_name = "answers"

    eval_generations: int = option(
        "Evaluation rows whose prompts the model answers at each evaluation, as many of each source; 0 for none.", 0
    )
    eval_max_new_tokens: int = option("Tokens of such an answer, at most.", 256)
    answer_scorers: list[str] | None = option(
        "How answers are compared with the rows' own, as SOURCE=SCORER, where a source may hold * and ?: exact, "
        "last_number, json, tool_call, regex:PATTERN, or auto, the default, which tells it by the row's own answer."
    )

    def __post_init__(self):
        if self.eval_generations < 0:
            raise UserError(f"--eval_generations is {self.eval_generations}; it must be at least 0 (0: none)")
        if self.eval_max_new_tokens < 1:
            raise UserError(f"--eval_max_new_tokens is {self.eval_max_new_tokens}; it must be at least 1")
        parse_scorers(self.answer_scorers)

    @property
    def scorers(self) -> dict[str, str]:
        """--answer_scorers as {source or pattern: scorer}, in their order."""
        return parse_scorers(self.answer_scorers)


def parse_scorers(words: list[str] | None) -> dict[str, str]:
    """{source or pattern: scorer} of SOURCE=SCORER, in their order.

    Raises:
        UserError: a word is of another form, names no scorer, names a source again, or holds a bad pattern.
    """
    found: dict[str, str] = {}
    for word in words or []:
        source, sign, scorer = word.partition("=")
        if not sign or not source:
            raise UserError(
                f"--answer_scorers: {printable(word)} isn't SOURCE=SCORER; for all sources write '*=exact'"
            )
        if source in found:
            raise UserError(f"--answer_scorers names the source {printable(source)} twice: give it one scorer")
        _check_scorer(scorer)
        found[source] = scorer
    return found


def _check_scorer(scorer: str) -> None:
    if not scorer.startswith(REGEX):
        if scorer not in SCORER_NAMES:
            hint = did_you_mean(scorer, SCORER_NAMES) or f"; known: {', '.join(SCORER_NAMES)}, {REGEX}PATTERN"
            raise UserError(f"--answer_scorers: unknown scorer {printable(scorer) or 'without a name'}{hint}")
        return
    pattern = scorer.removeprefix(REGEX)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--answer_scorers: {printable(pattern)} is no regular expression: {error}") from error


def scorer_of(source: str, scorers: dict[str, str]) -> str:
    """The scorer of a source: that of its own name, else of the first pattern that matches it, else auto."""
    if source in scorers:
        return scorers[source]
    return next((scorer for pattern, scorer in scorers.items() if fnmatchcase(source, pattern)), AUTO)


def check_sources(scorers: dict[str, str], sources: list[str]) -> None:
    """Raises UserError where a name or a pattern matches none of the sources."""
    for pattern in scorers:
        if not any(pattern == source or fnmatchcase(source, pattern) for source in sources):
            hint = did_you_mean(pattern, sources) or f"; there are: {', '.join(map(printable, sources))}"
            raise UserError(f"--answer_scorers: no source is called {printable(pattern)}{hint}")
