"""What a method of selection gives back: a verdict for each row, and what the report says of them all."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dft.reading.rows import Conversation, RejectedRow
from dft.reading.untrainable import reject


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one row."""

    reason: str = ""  # a short name to count by; "" keeps the row
    detail: str = ""  # why, for people
    score: float | None = None  # what the decision was made by
    text: str | None = None  # JSON that is written instead of the row; None: the row word for word


KEPT = Verdict()
NO_INSTRUCTION = Verdict("no_instruction", "no user says anything")


@dataclass
class Decision:
    """What a method says of all rows."""

    verdicts: list[Verdict]  # one for each row, in the order of the rows
    scores: dict[str, Sequence[float]] = field(default_factory=dict)  # name -> values; NaN where there is none
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # name of a .jsonl file -> its objects
    facts: dict[str, Any] = field(default_factory=dict)  # for selection_report.json
    notes: list[str] = field(default_factory=list)  # whole sentences for the console and the page


# Takes every valid row of all files, in order, once: a method that needs rows again keeps them
Decide = Callable[[Iterator[Conversation]], Decision]


@dataclass(frozen=True)
class Command:
    """One subcommand of scripts/select_data.py.

    Args:
        help: one line.
        description: what its own --help says first.
        add_arguments: adds the flags that only this command has.
        method: makes the method from the flags; raises UserError before a row is read if they can't be used.
        also_read: flags that name further files of rows, without the dashes.
    """

    name: str
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    method: Callable[[argparse.Namespace], Decide]
    also_read: tuple[str, ...] = ()


def apply(rows: list[Conversation], decide: Decide) -> tuple[list[Conversation], list[RejectedRow]]:
    """The rows that a method keeps, word for word, and the others with their reasons. For notebooks.

    Raises:
        UserError: as the method does.
    """
    verdicts = decide(iter(rows)).verdicts
    pairs = list(zip(rows, verdicts, strict=True))
    kept = [row for row, verdict in pairs if not verdict.reason]
    return kept, [reject(row, verdict.reason, verdict.detail) for row, verdict in pairs if verdict.reason]
