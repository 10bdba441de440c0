"""Cut a JSON file into rows: one object on each line, objects over several lines, or the items of one array."""

import codecs
import json
from collections.abc import Iterator

from dft.reading.row_memory import expands_too_much
from dft.reading.rows import RawRow
from dft.reading.streams import BUFFER_BYTES, COMPRESSED, Stream, encoding_problem, open_stream
from dft.reading.strict_json import TOO_MANY_VALUES, json_problem
from dft.reading.text_window import TextWindow

MAX_ROW_BYTES = 64 << 20
PREVIEW_BYTES = 1 << 20  # so much is kept of a line that is too long
WHITE_SPACE = b" \t\r\n"  # as JSON defines it
OTHER_FORMATS = {  # the first bytes of files that are often mistaken for JSON
    b"\x1f\x8b": "it is gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "it is Zstandard: name it .zst",
    b"PAR1": "it is Parquet: name it .parquet",
    codecs.BOM_UTF16_LE: "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    codecs.BOM_UTF16_BE: "it is UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    **dict.fromkeys((b"{\0", b"[\0"), "it is UTF-16: convert it with `iconv -f UTF-16LE -t UTF-8`"),
    **dict.fromkeys((b"\0{", b"\0["), "it is UTF-16: convert it with `iconv -f UTF-16BE -t UTF-8`"),
}
SCANNER = json.JSONDecoder(parse_int=len)  # only finds where values end, so integers are not converted


def json_rows(path: str, head: bytes) -> Iterator[RawRow]:
    """The rows of a JSON file.

    Args:
        head: the first four bytes of the file.

    Raises:
        DAMAGE_ERRORS: the file is damaged; all rows before that have been returned.
    """
    if not path.endswith(COMPRESSED):
        for first_bytes, what in OTHER_FORMATS.items():
            if head.startswith(first_bytes):
                yield RawRow(1, "", reason="unreadable_file", detail=f"not UTF-8 at byte 0: {what}")
                return
    with open_stream(path) as stream:
        start = stream.peek(BUFFER_BYTES).removeprefix(codecs.BOM_UTF8).lstrip(WHITE_SPACE)
    with open_stream(path) as stream:
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
        with open_stream(path) as stream:
            return next(_object_rows(stream)).reason is None


# ---- lines --------------------------------------------------------------------------------------


def _line_rows(stream: Stream) -> Iterator[RawRow]:
    """Every line that holds more than white space."""
    number = offset = 0
    # lines end at line feeds alone: str.splitlines also ends them at U+2028 and others, which JSON allows in strings
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            detail = f"{_too_long('a line')}; the rest of the file is not read"
            preview = line[:PREVIEW_BYTES].decode("utf-8", "replace")
            yield RawRow(number, preview, reason="row_too_long", detail=detail)
            return
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if data.strip(WHITE_SPACE):
            try:
                yield RawRow(number, data.rstrip(b"\r\n").decode("utf-8"))
            except UnicodeDecodeError as error:
                text = data.decode("utf-8", "backslashreplace").rstrip("\r\n")
                detail = encoding_problem(offset + error.start, error)
                yield RawRow(number, text, reason="not_utf8", detail=detail)
        else:
            lines, blank = _skip_blank_lines(stream)
            number += lines
            offset += blank
        offset += len(line)


def _skip_blank_lines(stream: Stream) -> tuple[int, int]:
    """Reads on to the next line that holds more than white space, a buffer at once; returns the lines and bytes."""
    lines = skipped = 0
    while True:
        ahead = stream.peek(BUFFER_BYTES)
        blank = ahead[: len(ahead) - len(ahead.lstrip(WHITE_SPACE))]
        blank = blank[: blank.rfind(b"\n") + 1]
        if not blank:
            return lines, skipped
        stream.read(len(blank))
        lines += blank.count(b"\n")
        skipped += len(blank)


# ---- arrays, and objects over several lines -----------------------------------------------------


def _array_rows(stream: Stream) -> Iterator[RawRow]:
    """Every item of a JSON array; ends at the first broken one."""
    window = TextWindow(stream)
    window.next_character()
    window.move_to(window.position + 1)
    needs_item = False  # True after a comma
    while window.next_character() != "]" or needs_item:
        end = _end_of_value(window)
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


def _object_rows(stream: Stream) -> Iterator[RawRow]:
    """Every JSON object, where objects may go over several lines; ends at the first broken one."""
    window = TextWindow(stream)
    while window.next_character() or window.not_utf8:
        end = _end_of_value(window)
        if isinstance(end, str):
            yield _unread(window, end)
            return
        yield RawRow(window.line, window.text[window.position : end])
        window.move_to(end)


def _unread(window: TextWindow, problem: str) -> RawRow:
    """The rest of a file after a problem."""
    rest = window.text[window.position : window.position + MAX_ROW_BYTES]
    problem = problem if rest or not window.not_utf8 else window.not_utf8  # bytes that aren't UTF-8 end the text
    return RawRow(window.line, rest, reason="rest_of_file_unread", detail=f"{problem}; the rest is not read")


def _end_of_value(window: TextWindow) -> int | str:
    """Where the JSON value at the window's position ends, or what is wrong with it."""
    while True:
        try:
            _, end = SCANNER.raw_decode(window.text, window.position)
            if end + 2 < len(window.text) or window.at_end:  # otherwise a number may go on, as in 1e+5
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
        if expands_too_much(window.rest()):
            return TOO_MANY_VALUES
        window.grow()


def _too_long(what: str) -> str:
    return f"{what} of more than {MAX_ROW_BYTES >> 20} MiB"
