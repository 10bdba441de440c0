"""Files of answers to judge: read strictly, and paired by their prompts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft.config.data import ROLES
from dft.errors import UserError
from dft.judging.prompts import Case
from dft.printable import printable
from dft.reading.formats import check_object, parse
from dft.reading.messages import OLDER_ROLES, read_messages
from dft.reading.raw_rows import read_rows
from dft.reading.rows import RawRow, RowError, malformed
from dft.reading.strict_json import kind, validate_value

COLUMNS = ("prompt", "answer", "reference", "channel")  # all others may hold anything
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Answer:
    """One row of a file of answers.

    Args:
        prompt: messages with role and content.
        reference: a good answer, if there is one.
        channel: the source of the prompt; "" for none.
        line: where the row starts, from 1.
    """

    prompt: tuple[dict[str, Any], ...]
    answer: str
    reference: str | None
    channel: str
    path: str
    line: int

    @property
    def place(self) -> str:
        return f"{printable(self.path)}:{self.line}"

    @property
    def prompt_key(self) -> str:
        """What is the same for the same prompt, whether it is written as a text or as messages."""
        return json.dumps(self.prompt, sort_keys=True)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    a: Answer
    b: Answer

    @property
    def is_same(self) -> bool:
        return self.a.answer == self.b.answer

    @property
    def reference(self) -> str | None:
        return self.a.reference if self.a.reference is not None else self.b.reference

    @property
    def channel(self) -> str:
        return self.a.channel or self.b.channel

    def case(self, order: str) -> Case:
        """What the judge sees with A first ("AB") or B first ("BA")."""
        answers = (self.a.answer, self.b.answer) if order == "AB" else (self.b.answer, self.a.answer)
        return Case(self.a.prompt, answers, self.reference)


def load_answers(path: Path) -> list[Answer]:
    """The rows of a file: JSON lines, a JSON array or Parquet, with the keys prompt and answer.

    A prompt is a text, or messages with role and content. `reference` and `channel` are texts; they may be null or
    missing. A row without a channel is of its `source`, if that is a text.

    Raises:
        UserError: the file can't be read or is empty, or rows of it can't be used, with their places.
    """
    answers: list[Answer] = []
    problems: list[str] = []
    for raw in read_rows(str(path)):
        try:
            answers.append(_answer(raw, str(path)))
        except RowError as error:
            problems.append(f"{printable(path)}:{raw.line}: {error.detail}")
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        shown = problems[:SHOWN_PROBLEMS] + ([f"and {more:,} more"] if more > 0 else [])
        raise UserError("\n".join(["these rows can't be judged; mend them or leave them out:", *shown]))
    return answers


def _answer(raw: RawRow, path: str) -> Answer:
    row = parse(raw)
    check_object(row, COLUMNS)
    for column in COLUMNS[:2]:
        if column not in row:
            found = ", ".join(f"{key!r:.40}" for key in list(row)[:9]) or "nothing"
            raise malformed(f"no {column!r} (found {found})")
    for column in COLUMNS:
        validate_value(row.get(column), repr(column))
    texts = {column: row.get(column) for column in COLUMNS[1:]}
    for column, value in texts.items():
        if not isinstance(value, str) and (value is not None or column == "answer"):
            raise malformed(f"{column!r} must be text, not {kind(value)}")
    source = row.get("source")  # what scripts/evaluate.py calls the channel
    channel = (texts["channel"] or (source if isinstance(source, str) else "")).strip()
    return Answer(_prompt(row["prompt"]), texts["answer"], texts["reference"], channel, path, raw.line)


def _prompt(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        if not value.strip():
            raise malformed("'prompt' is empty")
        return ({"role": "user", "content": value},)
    for message in value if isinstance(value, list) else []:
        role = message.get("role", "user") if isinstance(message, dict) else "user"
        if role not in (*ROLES, *OLDER_ROLES):
            raise malformed(f"'prompt' has the role {role!r:.60}; allowed are {', '.join(ROLES)}")
    return tuple(read_messages(value, "prompt", {}))


# ---- pairs --------------------------------------------------------------------------------------


def pair_answers(a: Sequence[Answer], b: Sequence[Answer]) -> tuple[list[Pair], list[Answer]]:
    """The answers of both files to the same prompts, in the order of A; and those whose prompt the other lacks.

    Raises:
        UserError: a prompt occurs twice in a file, the two references of a prompt differ, or no prompt is in both.
    """
    of_a, of_b = _by_prompt(a), _by_prompt(b)
    pairs = [Pair(answer, of_b[key]) for key, answer in of_a.items() if key in of_b]
    if not pairs:
        raise UserError(
            f"no prompt of {printable(a[0].path)} is in {printable(b[0].path)}: the answers of both models must be "
            "to the same prompts, word for word"
        )
    for pair in pairs:
        if None not in (pair.a.reference, pair.b.reference) and pair.a.reference != pair.b.reference:
            raise UserError(f"{pair.a.place} and {pair.b.place} have the same prompt and different references")
    alone = [answer for key, answer in of_a.items() if key not in of_b]
    return pairs, alone + [answer for key, answer in of_b.items() if key not in of_a]


def _by_prompt(answers: Sequence[Answer]) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    for answer in answers:
        earlier = found.setdefault(answer.prompt_key, answer)
        if earlier is not answer:
            raise UserError(
                f"{earlier.place} and {answer.place} have the same prompt: leave one of them out, because answers are "
                "paired by their prompts"
            )
    return found


def repeated_prompts(answers: Sequence[Answer]) -> int:
    """The rows whose prompt an earlier row has."""
    return len(answers) - len({answer.prompt_key for answer in answers})


def by_channel(items: Sequence[Any], channel_of: Callable[[Any], str]) -> dict[str, list[Any]]:
    """The items of each channel, in the order in which they occur; empty where no item has one."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(channel_of(item), []).append(item)
    return groups if set(groups) != {""} else {}
