"""Read the rows of one file one after the other, in memory that doesn't grow with the file.

JSON is cut into rows by json_rows.py and parsed by formats.py. `load_dataset("json")` is not used: it guesses
one schema for a whole file and rewrites text to fit it.
"""

from collections.abc import Iterator

import pyarrow.parquet

from dft.errors import UserError
from dft.printable import printable
from dft.reading.json_rows import json_rows
from dft.reading.rows import RawRow
from dft.reading.streams import DAMAGE_ERRORS

PARQUET_ROWS = 256  # read at once
PARQUET_BUFFER_BYTES = 1 << 20


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
    rows = _parquet_rows(path) if path.endswith(".parquet") else json_rows(path, head)
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


def _parquet_rows(path: str) -> Iterator[RawRow]:
    line = 0
    # pre_buffer=True would hold whole row groups in memory
    options = {"buffer_size": PARQUET_BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
    with pyarrow.parquet.ParquetFile(path, **options) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the same name: {', '.join(names)}")
        for batch in file.iter_batches(PARQUET_ROWS):
            for value in batch.to_pylist():
                line += 1
                yield RawRow(line, "", value)
