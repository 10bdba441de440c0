"""Read the rows of one file one after the other, in memory that doesn't grow with the file.

JSON is cut into rows by json_rows.py and parsed by formats.py; parquet_rows.py reads Parquet. `load_dataset("json")`
is not used: it guesses one schema for a whole file and rewrites text to fit it.
"""

from collections.abc import Iterator

from dft.errors import UserError
from dft.printable import printable
from dft.reading.json_rows import json_rows
from dft.reading.parquet_rows import parquet_rows
from dft.reading.rows import RawRow
from dft.reading.streams import DAMAGE_ERRORS


def read_rows(path: str) -> Iterator[RawRow]:
    """Reads the rows of one file: of Parquet, of a JSON array, or JSON objects one after the other.

    An array is told from objects by the first character. Empty lines, a byte-order mark and Windows line ends
    are allowed. A part that can't be read is returned as a row with a `reason`.

    Raises:
        UserError: the file can't be opened.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UserError(f"{printable(path)} can't be read: {error.strerror}") from error
    rows = parquet_rows(path) if path.endswith(".parquet") else json_rows(path, head)
    line = 0
    try:
        for row in rows:
            line = row.line
            yield row
    except DAMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{printable(path)} can't be read: {error.strerror}") from error
        problem = " ".join(str(error).split())
        detail = f"damaged after line {line} ({problem}); the rest of the file is not read"
        yield RawRow(line + 1, "", reason="unreadable_file", detail=detail)
        return
    if line == 0:
        yield RawRow(1, "", reason="empty_file", detail="the file holds no row")
