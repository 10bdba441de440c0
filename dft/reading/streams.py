"""Open data files, compressed or not, as streams of bytes."""

import gzip
import io
import zlib

import pyarrow

COMPRESSED = (".gz", ".zst")  # suffixes that may follow .json and .jsonl
BUFFER_BYTES = 1 << 16  # read from the disk at once
# Reading a damaged compressed or Parquet file may raise any of these.
DAMAGE_ERRORS = (EOFError, zlib.error, pyarrow.ArrowException, OSError, ValueError, OverflowError)
Stream = io.BufferedReader | gzip.GzipFile


def open_stream(path: str) -> Stream:
    """The decompressed bytes of a file."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), BUFFER_BYTES)
    return open(path, "rb", buffering=BUFFER_BYTES)


def encoding_problem(position: int, error: UnicodeDecodeError) -> str:
    """Describes bytes that are not UTF-8, from the byte `position` of the stream on."""
    return f"not UTF-8 at byte {position} ({error.reason}): convert the file with `iconv -f ENCODING -t UTF-8`"
