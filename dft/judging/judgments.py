"""The output: a line of JSON for each judged row, appended as it comes, so that no reply is paid for twice."""

import json
import logging
from pathlib import Path
from typing import Any

from dft.errors import UserError
from dft.judging.votes import Vote, vote_from_json
from dft.printable import printable

logger = logging.getLogger(__name__)

BEGINNING = b'{"key": "'  # of every line


class Judgments:
    """The votes of earlier runs and of this one, by the key of their question.

    Args:
        path: of the output, which is made if it is missing; None keeps nothing.

    Attributes:
        votes: {key: votes}; of a question that was asked again, the last ones.

    Raises:
        UserError: the file can't be written, or holds something else.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.votes: dict[str, list[Vote]] = {}
        if path is None:
            return
        try:
            content = path.read_bytes() if path.exists() else b""
            whole, line_feed, rest = content.rpartition(b"\n")
            for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
                self._read(line, number)
            if rest and not rest.startswith(BEGINNING):
                raise self._foreign(whole.count(b"\n") + 1 + bool(line_feed))
            with path.open("r+b" if content else "ab") as file:  # also tries whether it can be written
                file.truncate(len(content) - len(rest))  # of a line that a stopped run left unfinished
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, key: str, about: dict[str, Any], votes: list[Vote]) -> None:
        """Keeps the votes on a question.

        Args:
            about: what the line says beside the key and the votes.

        Raises:
            UserError: the file can't be written.
        """
        self.votes[key] = votes
        if self.path is None:
            return
        line = json.dumps({"key": key, **about, "votes": [vote.as_json() for vote in votes]}, ensure_ascii=False)
        try:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _read(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            self.votes[row["key"]] = [vote_from_json(vote) for vote in row["votes"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(number) from error

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"--output {printable(self.path)}:{number} isn't a line that a judge has written: give a new file, or "
            "that of an earlier run"
        )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--output {printable(self.path)} can't be written: {error.strerror or error}")
