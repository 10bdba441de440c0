"""Rejected rows: written to rejected.jsonl as they come, counted by reason, and the decision to stop a run."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from dft.config.data import DataValidation
from dft.errors import UserError
from dft.reading.rows import RejectedRow

SHOWN_ERRORS = 20
DROPPED_ON_REQUEST = ("duplicate", "leaked")


class RejectionLog:
    """Collects rejected rows; the counts and the first few of them stay in memory.

    Args:
        path: a file of JSON lines, with every row whole.
        data_validation: the rows that stop the run. standard: malformed ones. strict: all but those that are dropped
            on request. lenient: none.
        truncation: error stops it at rows that are too long.

    Attributes:
        reasons: {path of the data file: {reason: rows}}.
        first: {path of the data file: its first rejected row}.
    """

    def __init__(self, path: Path, data_validation: DataValidation, truncation: str):
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self.first: dict[str, RejectedRow] = {}
        self._data_validation = data_validation
        self._truncation = truncation
        self._stopping: Counter[str] = Counter()  # reason -> rows
        self._shown: list[str] = []
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> "RejectionLog":
        self._file = open(self._path, "w", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[RejectedRow]) -> None:
        """Takes in more rows."""
        for row in rows:
            self._file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
            self.reasons[row.path][row.reason] += 1
            self.first.setdefault(row.path, row)
            if self._stops(row):
                self._stopping[row.reason] += 1
                if len(self._shown) < SHOWN_ERRORS:
                    self._shown.append(str(row))

    def _stops(self, row: RejectedRow) -> bool:
        if row.reason == "too_long":
            return self._truncation == "error"
        if row.reason in DROPPED_ON_REQUEST:
            return False
        return self._data_validation == "strict" or (self._data_validation == "standard" and row.is_malformed)

    def stop(self) -> None:
        """Raises UserError with the places of the rows that the run can't go on with, if there are any."""
        total = self._stopping.total()
        if total == 0:
            return
        lines = self._shown + ([f"… and {total - SHOWN_ERRORS} more"] if total > SHOWN_ERRORS else [])
        remedy = "Mend them, or drop them with --data_validation lenient."
        if set(self._stopping) == {"too_long"}:
            remedy = "Raise --max_length, or choose another --truncation than error."
        rows = "1 row" if total == 1 else f"{total:,} rows"
        raise UserError(f"{rows} can't be used ({_in_words(self._stopping)}). {remedy}\n" + "\n".join(lines))

    def stop_if_nothing_is_left(self, rows: int, paths: list[str], flag: str) -> None:
        """Raises UserError with the reasons if none of the rows of some files are left."""
        if rows > 0:
            return
        reasons = sum((self.reasons[path] for path in paths), Counter())
        first = next((f"\nthe first: {self.first[path]}" for path in paths if path in self.first), "")
        raise UserError(f"no row of --{flag} is left: {_in_words(reasons) or 'the files hold none'}{first}")


def _in_words(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
