"""The first reading of the files: valid rows go to the method, the others are dropped with their reasons."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from dft.errors import UserError
from dft.printable import printable
from dft.reading.discovery import find_data_files
from dft.reading.formats import read_file
from dft.reading.rows import Conversation, RejectedRow
from dft.reading.streams import COMPRESSED
from dft.reading.untrainable import reject_untrainable
from dft.selection.method import Verdict


@dataclass
class InputFile:
    """One data file, and what is known of it once it has been read.

    Attributes:
        dropped: {place of the row in the file, from 0: why it can't be trained on}.
    """

    path: str
    state: tuple[int, int]  # size in bytes and time of the last change, to notice a change between two readings
    rows_read: int = 0
    dropped: dict[int, Verdict] = field(default_factory=dict)

    @property
    def real_path(self) -> str:
        """Its path without links."""
        return os.path.realpath(self.path)


def find_inputs(patterns: list[str], flag: str = "data_files") -> list[InputFile]:
    """The files that paths, directories and globs name.

    Raises:
        UserError: some name nothing, or ask for a sample.
    """
    files = find_data_files(patterns, flag)
    sampled = [file.path for file in files if file.max_rows is not None]
    if sampled:
        raise UserError(f"--{flag} {printable(sampled[0])}#N: all rows of a file are selected from, leave out the #N")
    return [InputFile(file.path, state_of(file.path)) for file in files]


def state_of(path: str) -> tuple[int, int]:
    """The size of a file in bytes, and when it was last changed.

    Raises:
        UserError: the file has gone.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{printable(path)} can't be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def read_inputs(
    files: list[InputFile],
    data_format: str,
    role_map: dict[str, str],
    progress: bool | None = None,
    *,
    with_untrainable: bool = False,
) -> Iterator[Conversation]:
    """The valid rows of all files, in order; counts all rows, and notes why the others are dropped.

    Args:
        with_untrainable: rows in which the assistant says nothing are valid too.
        progress: show a bar on stderr; None for one where stderr is a terminal.

    Raises:
        UserError: a file can't be opened.
    """
    is_shown = sys.stderr.isatty() if progress is None else progress
    total = sum(file.state[0] for file in files)
    with tqdm(desc="Reading", total=total, unit="B", unit_scale=True, disable=not is_shown) as bar:
        before = 0  # bytes of the files that have been read
        for file in files:
            for row in _rows_of(file, data_format, role_map, with_untrainable):
                yield row
                if not file.path.endswith((*COMPRESSED, ".parquet")):  # else the bytes of a row aren't known
                    bar.update(min(len(row.row), before + file.state[0] - bar.n))  # at least: characters of more bytes
            before += file.state[0]
            bar.update(before - bar.n)


def _rows_of(
    file: InputFile, data_format: str, role_map: dict[str, str], with_untrainable: bool
) -> Iterator[Conversation]:
    file.rows_read, file.dropped = 0, {}
    rows = read_file(file.path, data_format, role_map)
    for row in rows if with_untrainable else map(reject_untrainable, rows):
        file.rows_read += 1
        if isinstance(row, RejectedRow):
            file.dropped[file.rows_read - 1] = Verdict(row.reason, row.detail)
        else:
            yield row
