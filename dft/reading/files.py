"""Finding data files and reading their rows one by one, in memory that doesn't grow with the file.

JSON is cut into rows here and parsed in data_formats.py. `load_dataset("json")` is not used: it guesses
one schema for a file and rewrites text to fit it.
"""

import codecs
import glob
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from dft.errors import UserError
from dft.reading.strict_json import json_problem

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")  # .json and .jsonl alone
CHUNK = 1 << 20  # bytes of JSON looked at at once
BUFFER = 1 << 16  # bytes read at once
MAX_ROW_BYTES = 64 << 20
PARQUET_ROWS = 256  # read at once
SAMPLE = re.compile(r"(.+)#(\d+)")
SPACE = re.compile(r"[ \t\r\n]*")
BLANKS = b" \t\r\n"
FIRST_BYTES = {  # of what is often mistaken for JSON
    b"\x1f\x8b": "it is gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "it is Zstandard: name it .zst",
    b"PAR1": "it is Parquet: name it .parquet",
    codecs.BOM_UTF16_LE: "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    codecs.BOM_UTF16_BE: "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    **dict.fromkeys((b"{\0", b"[\0"), "it is UTF-16: convert it with `iconv -f UTF-16LE -t UTF-8`"),
    **dict.fromkeys((b"\0{", b"\0["), "it is UTF-16: convert it with `iconv -f UTF-16BE -t UTF-8`"),
}
# of a compressed or a Parquet file
DAMAGE = (EOFError, zlib.error, pyarrow.ArrowException, OSError, ValueError, OverflowError)


@dataclass(frozen=True)
class DataFile:
    """One file, and how much of it is wanted."""

    path: str
    max_rows: int | None = None  # a random sample of so many rows
    weight: float = 1.0  # how often each of its rows is seen in an epoch


@dataclass
class RawRow:
    """One row as it stands in the file; `text` is JSON, not yet parsed, and `value` a row of Parquet."""

    line: int  # of its first character, from 1; in Parquet the row
    text: str
    value: Any = None
    reason: str | None = None  # why it, and perhaps all after it, can't be read
    detail: str = ""


# ---- finding ------------------------------------------------------------------------------------


def find_data_files(patterns: list[str], flag: str, weights: list[float] | None = None) -> list[DataFile]:
    """The files that paths, directories and globs name, in order, each once.

    Args:
        patterns: each may end with #N, for a random sample of at most N rows from each of its files.
        weights: one for each pattern, see DataFile.

    Raises:
        UserError: some of them name nothing, or a file of another kind; all are listed.
    """
    if weights is not None and len(weights) != len(patterns):
        raise UserError(f"--data_weights has {len(weights)} values for {len(patterns)} --{flag}: give one for each")
    found: dict[Path, DataFile] = {}
    problems = []
    for pattern, weight in zip(patterns, weights or [1.0] * len(patterns), strict=True):
        sample = None if Path(pattern).exists() else SAMPLE.fullmatch(pattern)
        name, max_rows = (sample[1], int(sample[2])) if sample else (pattern, None)
        path = Path(name).expanduser()
        if path.is_dir():
            everything = sorted(str(p) for p in path.rglob("*") if not p.is_dir())
            files = [f for f in everything if is_data_file(Path(f)) and Path(f).is_file()]
            if skipped := sorted(set(everything) - set(files)):
                names = ", ".join(Path(f).name for f in skipped[:5])
                logger.warning("%s: %d files that are not data are skipped: %s", path, len(skipped), names)
        elif path.is_file():
            files = [str(path)]
        else:
            files = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if not files:
            what = "no data file in this directory" if path.is_dir() else "no such file"
            problems.append(f"  {pattern}: {what}")
        for f in files:
            file = DataFile(f, max_rows, weight)
            known = found.setdefault(Path(f).resolve(), file)
            if not is_data_file(Path(f)):
                problems.append(f"  {f}: not a {', '.join(SUFFIXES)} file")
            elif (known.max_rows, known.weight) != (max_rows, weight):
                problems.append(f"  {f}: named twice, with different samples or weights")
            elif f.encode("utf-8", "replace").decode() != f:
                problems.append(f"  {f!a}: rename it, the name is not UTF-8")
    if problems:
        raise UserError(f"--{flag}:\n" + "\n".join(problems))
    return list(found.values())


def is_data_file(path: Path) -> bool:
    """Whether the name says that rows can be read from it."""
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return path.suffix in SUFFIXES and path.suffix != ".parquet"
    return path.suffix in SUFFIXES


# ---- reading ------------------------------------------------------------------------------------


def read_rows(path: str) -> Iterator[RawRow]:
    """The rows of one file: of Parquet, of a JSON array, or one JSON object on each line.

    An array is told from lines by the first character. Blank lines, a byte-order mark and Windows line
    ends are fine. What can't be read is a row with a `reason`.

    Raises:
        UserError: the file can't be opened.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    rows = _parquet_rows(path) if path.endswith(".parquet") else _json_rows(path, head)
    line = 0
    try:
        for row in rows:
            line = row.line
            yield row
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path} can't be read: {error.strerror}") from error
        problem = " ".join(str(error).split())
        what = f"damaged after line {line} ({problem}); the rest of the file is not read"
        yield RawRow(line + 1, "", reason="unreadable_file", detail=what)
        return
    if line == 0:
        yield RawRow(1, "", reason="empty_file", detail="the file holds no row")


def _json_rows(path: str, head: bytes) -> Iterator[RawRow]:
    if not path.endswith(COMPRESSED):
        for first_bytes, what in FIRST_BYTES.items():
            if head.startswith(first_bytes):
                yield RawRow(1, "", reason="unreadable_file", detail=f"not UTF-8 at byte 0: {what}")
                return
    with _open(path) as stream:
        start = stream.peek(BUFFER).removeprefix(codecs.BOM_UTF8).lstrip(BLANKS)
    with _open(path) as stream:
        if start.startswith(b"["):
            yield from _array_rows(stream)
        elif _is_indented_object(path, start):
            yield from _object_rows(stream)
        else:
            yield from _line_rows(stream)


def _is_indented_object(path: str, start: bytes) -> bool:
    """Whether the file starts with a JSON object that goes on after its first line."""
    first_line, line_feed, _ = start.partition(b"\n")
    if not line_feed or not first_line.startswith(b"{"):
        return False
    try:
        SCANNER.raw_decode(first_line.decode("utf-8"))
        return False
    except (ValueError, RecursionError):
        with _open(path) as stream:
            return next(_object_rows(stream)).reason is None


def _open(path: str) -> io.BufferedReader | gzip.GzipFile:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), BUFFER)
    return open(path, "rb", buffering=BUFFER)


def _line_rows(stream: io.BufferedReader | gzip.GzipFile) -> Iterator[RawRow]:
    """Every line that is not blank."""
    number = offset = 0
    # cut at line feeds alone: str.splitlines also cuts at U+2028 and others, which JSON allows in strings
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            detail = f"{_too_long('a line')}; the rest of the file is not read"
            yield RawRow(number, line[:CHUNK].decode("utf-8", "replace"), reason="row_too_long", detail=detail)
            return
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if data.strip(BLANKS):
            try:
                yield RawRow(number, data.decode("utf-8").rstrip("\r\n"))
            except UnicodeDecodeError as error:
                yield _not_utf8(number, data, offset + error.start, error)
        offset += len(line)


def _not_utf8(line: int, data: bytes, position: int, error: UnicodeDecodeError) -> RawRow:
    text = data.decode("utf-8", "backslashreplace").rstrip("\r\n")
    return RawRow(line, text, reason="not_utf8", detail=_encoding_problem(position, error))


def _encoding_problem(position: int, error: UnicodeDecodeError) -> str:
    return f"not UTF-8 at byte {position} ({error.reason}): convert the file with `iconv -f ENCODING -t UTF-8`"


class _TextWindow:
    """The part of a UTF-8 stream that is being looked at; grows at its end and is cut at its start."""

    def __init__(self, stream: io.BufferedReader | gzip.GzipFile):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        self.line = 1  # that `position` is on
        self.bytes_read = 0
        self.at_end = False
        self.not_utf8 = ""  # why the text ends here, before the stream does
        self.damage: Exception | None = None

    def grow(self) -> None:
        """Reads on: as much again as is waiting to be used, so that a long row is not tried too often."""
        rest = self.text[self.position :]
        data = self._read(max(CHUNK, len(rest)))
        self.at_end = not data
        self.text = rest + self._decode(data)
        self.position = 0

    def _read(self, size: int) -> bytes:
        """Up to `size` bytes; damage is raised only once all that comes before it has been given."""
        data = bytearray()
        while self.damage is None and len(data) < size:
            try:
                part = self.stream.read1(min(BUFFER, size - len(data)))
            except DAMAGE as error:
                self.damage = error
                break
            if not part:
                break
            data += part
        if self.damage is not None and not data:
            raise self.damage
        return bytes(data)

    def _decode(self, data: bytes) -> str:
        """The text of the next bytes, as far as they are UTF-8."""
        self.bytes_read += len(data)
        try:
            return self.decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            self.at_end = True
            self.not_utf8 = _encoding_problem(self.bytes_read - len(error.object) + error.start, error)
            return error.object[: error.start].decode("utf-8")

    def move_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """The next character that is not white space, now at `position`; empty at the end."""
        while True:
            self.move_to(SPACE.match(self.text, self.position).end())
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.grow()


def _array_rows(stream: io.BufferedReader | gzip.GzipFile) -> Iterator[RawRow]:
    """Every item of a JSON array; ends at the first broken one."""
    window = _TextWindow(stream)
    window.next_character()
    window.move_to(window.position + 1)
    needs_item = False  # after a comma
    while window.next_character() != "]" or needs_item:
        end = _end_of_item(window)
        if isinstance(end, str):
            yield _unread(window, end)
            return
        yield RawRow(window.line, window.text[window.position : end])
        window.move_to(end)
        needs_item = window.next_character() == ","
        if needs_item:
            window.move_to(window.position + 1)
        elif window.next_character() != "]":
            yield _unread(window, "broken JSON: a comma or the closing ] is missing")
            return
    window.move_to(window.position + 1)
    if window.next_character() or window.not_utf8:
        yield _unread(window, "broken JSON: text after the end of the array")


def _object_rows(stream: io.BufferedReader | gzip.GzipFile) -> Iterator[RawRow]:
    """Every JSON object, where they are spread over several lines; ends at the first broken one."""
    window = _TextWindow(stream)
    while window.next_character() or window.not_utf8:
        end = _end_of_item(window)
        if isinstance(end, str):
            yield _unread(window, end)
            return
        yield RawRow(window.line, window.text[window.position : end])
        window.move_to(end)


def _unread(window: _TextWindow, problem: str) -> RawRow:
    """What is left of a file after a problem; that the text isn't UTF-8 explains why it ends."""
    rest = window.text[window.position : window.position + MAX_ROW_BYTES]
    problem = problem if rest or not window.not_utf8 else window.not_utf8
    return RawRow(window.line, rest, reason="rest_of_file_unread", detail=f"{problem}; the rest is not read")


SCANNER = json.JSONDecoder(parse_int=len)  # only to find where values end


def _end_of_item(window: _TextWindow) -> int | str:
    """Where the JSON value at the window's position ends, or what is wrong with it."""
    while True:
        try:
            _, end = SCANNER.raw_decode(window.text, window.position)
            if end + 2 < len(window.text) or window.at_end:  # else a number might go on, as in 1e+5
                return end if end - window.position <= MAX_ROW_BYTES else _too_long("an item")
        except RecursionError as error:
            return json_problem(error)
        except json.JSONDecodeError as error:
            is_cut_off = error.msg.startswith("Unterminated") or error.pos + 16 > len(window.text)
            if is_cut_off and window.not_utf8:
                return window.not_utf8
            if window.at_end or not is_cut_off:
                line = window.line + window.text.count("\n", window.position, error.pos)
                return f"broken JSON: {error.msg} at line {line}"
        if len(window.text) - window.position > MAX_ROW_BYTES:
            return _too_long("an item")
        window.grow()


def _too_long(what: str) -> str:
    return f"{what} of more than {MAX_ROW_BYTES >> 20} MiB"


def _parquet_rows(path: str) -> Iterator[RawRow]:
    line = 0
    # pre_buffer reads whole row groups
    options = {"buffer_size": CHUNK, "pre_buffer": False, "page_checksum_verification": True}
    with pyarrow.parquet.ParquetFile(path, **options) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the same name: {', '.join(names)}")
        for batch in file.iter_batches(PARQUET_ROWS):
            for value in batch.to_pylist():
                line += 1
                yield RawRow(line, "", value)
