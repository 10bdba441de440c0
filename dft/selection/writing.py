"""The second reading of the files: each row is written to its file or to dropped.jsonl, and counted."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from dft.errors import UserError
from dft.printable import printable
from dft.reading.formats import parse, written_row
from dft.reading.raw_rows import read_rows
from dft.reading.rows import RawRow
from dft.selection.inputs import InputFile, state_of
from dft.selection.method import Verdict
from dft.selection.outputs import DROPPED, KEPT_DIRECTORY, output_names

EXAMPLES = 5  # dropped rows of each reason that the page shows
# A line feed can't stand inside a string of JSON, so this is white space between values
LINE_BREAK = re.compile(r"[ \t\r]*\n[ \t\r\n]*")


@dataclass
class Dropped:
    """One row that is not kept, as dropped.jsonl holds it."""

    path: str
    line: int
    reason: str
    score: float | None
    detail: str
    row: str


@dataclass
class Written:
    """The counts of one file, and what examples of dropped rows show."""

    path: str
    output: str | None  # in the output directory; None where no row is kept
    rows_read: int = 0
    kept: int = 0
    rewritten: int = 0  # of the kept rows, those that are not word for word
    dropped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """For the report; every row that was read is accounted for."""
        accounted = self.kept + self.dropped.total()
        assert self.rows_read == accounted, f"{self.path}: {self.rows_read} rows read, {accounted} accounted for"
        return {**self.__dict__, "dropped": dict(self.dropped.most_common())}


class RowWriter:
    """Writes the rows of all files where their verdicts say, in a second reading.

    Args:
        verdicts: one for each valid row of all files, in order.
        directory: of the output; it gets kept/ and dropped.jsonl.

    Attributes:
        examples: {reason: the first dropped rows}.
    """

    def __init__(self, verdicts: Iterator[Verdict], directory: Path):
        self.examples: dict[str, list[Dropped]] = defaultdict(list)
        self._verdicts = verdicts
        self._directory = directory
        self._dropped: TextIO | None = None

    def write(self, files: list[InputFile]) -> list[Written]:
        """The counts of each file.

        Raises:
            UserError: a file has changed since it was first read.
        """
        (self._directory / KEPT_DIRECTORY).mkdir()
        names = output_names([file.path for file in files])
        with open(self._directory / DROPPED, "w", encoding="utf-8") as self._dropped:
            return [self._write_file(file, name) for file, name in zip(files, names, strict=True)]

    def _write_file(self, file: InputFile, name: str) -> Written:
        result = Written(file.path, f"{KEPT_DIRECTORY}/{name}")
        path = self._directory / result.output
        with open(path, "w", encoding="utf-8", newline="\n") as kept:
            for raw in islice(read_rows(file.path), file.rows_read):
                verdict = file.dropped.get(result.rows_read) or next(self._verdicts)
                result.rows_read += 1
                if verdict.reason:
                    score = None if verdict.score is None or not math.isfinite(verdict.score) else verdict.score
                    self._drop(Dropped(file.path, raw.line, verdict.reason, score, verdict.detail, text_of(raw)))
                    result.dropped[verdict.reason] += 1
                else:
                    kept.write(on_one_line(verdict.text or text_of(raw)) + "\n")
                    result.kept += 1
                    result.rewritten += verdict.text is not None
        if result.rows_read != file.rows_read or state_of(file.path) != file.state:
            raise UserError(f"{printable(file.path)} has changed while it was read: start again")
        if not result.kept:
            path.unlink()  # the trainer would refuse an empty file
            result.output = None
        return result

    def _drop(self, row: Dropped) -> None:
        self._dropped.write(json.dumps(row.__dict__, ensure_ascii=False) + "\n")
        if len(self.examples[row.reason]) < EXAMPLES:
            self.examples[row.reason].append(row)


def text_of(raw: RawRow) -> str:
    """The text of a row as it stands in its file; a row of Parquet as a line of JSON."""
    return raw.text if raw.value is None else written_row(parse(raw))


def on_one_line(text: str) -> str:
    """A row of JSON without line breaks between its values; nothing else is changed, and nothing in one line."""
    return LINE_BREAK.sub(" ", text) if "\n" in text else text
