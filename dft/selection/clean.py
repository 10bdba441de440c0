"""The command clean: each row is judged by itself, by the rules that are asked for; all are off by default.

A row is dropped for the first rule that it breaks, in the order of the flags. Lengths and entropy are of all messages;
repetition and refusals of the assistant's, which is what is learned; personal data is looked for in every string of
the row. With `--pii mask` rows are rewritten, and only by that.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dft.errors import UserError
from dft.reading.rows import Conversation, RejectedRow
from dft.selection import measures
from dft.selection.language import check_languages, language_teller
from dft.selection.method import KEPT, Command, Decide, Decision, Verdict, apply
from dft.selection.pii import mask_json
from dft.selection.refusals import refusal

PII = ("report", "mask", "drop")
MAX_NGRAM = 100
SHARES = ("max_repeated_lines", "max_repeated_ngrams", "max_top_ngram")
RANGES = ("characters", "turns", "entropy")


@dataclass(frozen=True)
class CleanConfig:
    """Rules of clean; None leaves a rule out. See dft/selection/measures.py for what the numbers mean."""

    min_characters: int | None = None  # of all messages
    max_characters: int | None = None
    min_turns: int | None = None  # messages of the assistant
    max_turns: int | None = None
    max_repeated_lines: float | None = None  # share of lines that repeat an earlier one
    max_repeated_ngrams: float | None = None  # share of n-grams that repeat an earlier one
    max_top_ngram: float | None = None  # share of words that the commonest n-gram makes
    ngram: int = 5  # words of these n-grams
    min_entropy: float | None = None  # bits for each character
    max_entropy: float | None = None
    languages: tuple[str, ...] | None = None  # codes of ISO 639; rows of others are dropped
    refusals: bool = False  # drop rows whose last answer begins as a refusal
    pii: str | None = None  # personal data and keys: report, mask or drop

    def __post_init__(self):
        for name in RANGES:
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            for flag, value in ((f"--min_{name}", low), (f"--max_{name}", high)):
                if value is not None and not 0 <= value < float("inf"):
                    raise UserError(f"{flag} is {value}: give a number of at least 0")
            if low is not None and high is not None and low > high:
                raise UserError(f"--min_{name} {low} is above --max_{name} {high}: no row can have both")
        for name in SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} is {value}: give a share from 0 to 1")
        if not 1 <= self.ngram <= MAX_NGRAM:
            raise UserError(f"--ngram is {self.ngram}: give 1 to {MAX_NGRAM} words")
        if self.pii is not None and self.pii not in PII:
            raise UserError(f"--pii is {self.pii}: give one of {', '.join(PII)}")
        if self.languages is not None:
            check_languages(self.languages)


# ---- rules --------------------------------------------------------------------------------------

Rule = Callable[
    [Conversation, dict[str, list[Any]]], Verdict | None
]  # notes its measure; the verdict of a broken rule


def _bounded(
    title: str,
    measure: Callable[[Conversation], float],
    low: tuple[str, float | None],
    high: tuple[str, float | None],
    row: Conversation,
    scores: dict[str, list[Any]],
) -> Verdict | None:
    """A rule that a measure lies in a range.

    Args:
        title: of the measure.
        low, high: the reason by which a row below or above is dropped, and the bound, None for none.
    """
    value = measure(row)
    scores.setdefault(title, []).append(value)
    shown = f"{title.lower()}: {value:.4g}" if isinstance(value, float) else f"{title.lower()}: {value:,}"
    if low[1] is not None and value < low[1]:
        return Verdict(low[0], f"{shown}, fewer than {low[1]:g}", value)
    if high[1] is not None and value > high[1]:
        return Verdict(high[0], f"{shown}, more than {high[1]:g}", value)
    return None


def _bounded_rules(config: CleanConfig) -> list[Rule]:
    n = config.ngram
    listed = (
        ("Characters", measures.num_characters, "too_short", config.min_characters, "too_long", config.max_characters),
        ("Turns", measures.num_turns, "too_few_turns", config.min_turns, "too_many_turns", config.max_turns),
        ("Share of repeated lines", measures.repeated_lines, "", None, "repeated_lines", config.max_repeated_lines),
        (
            *(f"Share of repeated {n}-grams", partial(measures.repeated_ngrams, size=n), "", None),
            *("repeated_ngrams", config.max_repeated_ngrams),
        ),
        (
            *(f"Share of the commonest {n}-gram", partial(measures.top_ngram, size=n), "", None),
            *("top_ngram", config.max_top_ngram),
        ),
        ("Entropy", measures.entropy, "low_entropy", config.min_entropy, "high_entropy", config.max_entropy),
    )
    return [
        partial(_bounded, title, measure, (low, minimum), (high, maximum))
        for title, measure, low, minimum, high, maximum in listed
        if minimum is not None or maximum is not None
    ]


def _language_rule(languages: tuple[str, ...]) -> Rule:
    tell = language_teller()

    def judge(row: Conversation, scores: dict[str, list[Any]]) -> Verdict | None:
        told = tell("\n".join(measures.texts_of(row, role) for role in ("user", "assistant")))
        scores.setdefault("Probability of the language", []).append(float("nan") if told is None else told[1])
        if told is None or told[0] in languages:
            return None
        return Verdict("language", f"language {told[0]}, probability {told[1]:.2f}", told[1])

    return judge


def _no_refusal(row: Conversation, scores: dict[str, list[Any]]) -> Verdict | None:
    answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
    words = refusal(answers[-1]) if answers else None
    return Verdict("refusal", f"the last answer begins with {words!r}") if words else None


# ---- the method ---------------------------------------------------------------------------------


def clean(config: CleanConfig) -> Decide:
    """The method of these rules."""
    rules = _bounded_rules(config)
    rules += [_language_rule(config.languages)] if config.languages is not None else []
    rules += [_no_refusal] if config.refusals else []

    def decide(rows: Iterator[Conversation]) -> Decision:
        decision = Decision([])
        scores: dict[str, list[Any]] = {}
        broken: Counter[str] = Counter()
        personal = PersonalData(config.pii)
        for row in rows:
            verdicts = [rule(row, scores) for rule in rules] + [personal.judge(row)]
            reasons = [verdict for verdict in verdicts if verdict is not None and verdict.reason]
            broken.update(verdict.reason for verdict in reasons)
            decision.verdicts.append(reasons[0] if reasons else verdicts[-1])
        decision.scores = scores
        decision.facts = {"rows_that_break_a_rule": dict(broken.most_common()), **personal.facts()}
        decision.tables = {"pii.jsonl": personal.table} if personal.table else {}
        decision.notes = personal.notes()
        if not rules and not config.pii:
            decision.notes = ["No rule was given: only rows that can't be trained on are dropped."]
        return decision

    return decide


def clean_rows(rows: list[Conversation], config: CleanConfig) -> tuple[list[Conversation], list[RejectedRow]]:
    """The rows that break no rule, and the others with their reasons.

    Raises:
        UserError: rows would have to be rewritten.
    """
    if config.pii == "mask":
        raise UserError("clean_rows rewrites no row: pii must be report or drop; scripts/select_data.py masks")
    return apply(rows, clean(config))


class PersonalData:
    """What is found by --pii, which is told without the data itself.

    Attributes:
        table: the rows that hold some: path, line and {kind: how many}.
    """

    def __init__(self, action: str | None):
        self.table: list[dict[str, Any]] = []
        self._action = action
        self._found: Counter[str] = Counter()

    def judge(self, row: Conversation) -> Verdict:
        """The verdict: kept, kept with what is found masked, or dropped."""
        masked, found = mask_json(row.row) if self._action else ("", Counter())
        if not found:
            return KEPT
        self._found += found
        self.table.append({"path": row.path, "line": row.line, "found": dict(found)})
        if self._action == "drop":
            kinds = ", ".join(f"{n} {kind}" for kind, n in found.items())
            return Verdict("personal_data", kinds, found.total())
        return Verdict(text=masked) if self._action == "mask" else KEPT

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {"personal_data": {"rows": len(self.table), "found": dict(self._found)}} if self._action else {}

    def notes(self) -> list[str]:
        """For the console."""
        if not self._action:
            return []
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self._found.most_common())
        if not self.table:
            return ["No personal data was found."]
        note = f"Personal data in {len(self.table):,} rows ({kinds}); see pii.jsonl."
        rewritten = "Those that are kept are written with it masked, and are not word for word."
        return [note, rewritten] if self._action == "mask" else [note]


# ---- the command --------------------------------------------------------------------------------


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--min_characters", type=int, help="of all messages")
    add("--max_characters", type=int, help="of all messages")
    add("--min_turns", type=int, help="messages of the assistant")
    add("--max_turns", type=int, help="messages of the assistant")
    add("--max_repeated_lines", type=float, help="share of the assistant's lines that repeat an earlier one")
    add("--max_repeated_ngrams", type=float, help="share of the assistant's n-grams that repeat an earlier one")
    add("--max_top_ngram", type=float, help="share of the assistant's words that the commonest n-gram makes")
    add("--ngram", type=int, default=CleanConfig.ngram, help="words of these n-grams; by default 5")
    add("--min_entropy", type=float, help="bits for each character")
    add("--max_entropy", type=float, help="bits for each character")
    add("--languages", type=_codes, help="codes of ISO 639 with commas between them, such as en,zh")
    add("--refusals", action="store_true", help="drop rows whose last answer begins as a refusal")
    add("--pii", choices=PII, help="addresses, phones, cards, IBANs, keys: counted, masked, or their rows dropped")


def _codes(text: str) -> tuple[str, ...]:
    return tuple(code.strip().lower() for code in text.split(","))


def _method(args: argparse.Namespace) -> Decide:
    return clean(CleanConfig(**{name: getattr(args, name) for name in CleanConfig.__dataclass_fields__}))


COMMAND = Command("clean", "drop rows by rules on each of them", __doc__, _add_arguments, _method)
