"""A window that moves over a UTF-8 stream, so that JSON values longer than one read can be parsed."""

import codecs
import re

from dft.reading.streams import BUFFER_BYTES, DAMAGE_ERRORS, Stream, encoding_problem

CHUNK_BYTES = 1 << 20  # read into the window at once
WHITE_SPACE = re.compile(r"[ \t\r\n]*")  # as JSON defines it


class TextWindow:
    """The part of a UTF-8 stream that is being parsed: text is added at its end and dropped at its start.

    Attributes:
        text: the text in the window.
        position: where the next value starts in `text`.
        line: the line of the file that `position` is on, from 1.
        at_end: whether the stream has no more text.
        not_utf8: where the text ends before the stream because of bytes that are not UTF-8, the problem in words.
    """

    def __init__(self, stream: Stream):
        self.text = ""
        self.position = 0
        self.line = 1
        self.at_end = False
        self.not_utf8 = ""
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes_read = 0
        self._damage: Exception | None = None

    def grow(self) -> None:
        """Reads on.

        At least as much is read as is waiting, so that a long value is tried only a few times.

        Raises:
            DAMAGE_ERRORS: the stream is damaged here.
        """
        rest = self.rest()
        data = self._read(max(CHUNK_BYTES, len(rest)))
        self.at_end = not data
        self.text = rest + self._decode(data)
        self.position = 0

    def _read(self, size: int) -> bytes:
        """Up to `size` bytes; damage is raised only once all bytes before it have been returned."""
        data = bytearray()
        while self._damage is None and len(data) < size:
            try:
                part = self._stream.read1(min(BUFFER_BYTES, size - len(data)))
            except DAMAGE_ERRORS as error:
                self._damage = error
                break
            if not part:
                break
            data += part
        if self._damage is not None and not data:
            raise self._damage
        return bytes(data)

    def _decode(self, data: bytes) -> str:
        """The text of the next bytes, up to the first one that is not UTF-8."""
        self._bytes_read += len(data)
        try:
            return self._decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            self.at_end = True
            self.not_utf8 = encoding_problem(self._bytes_read - len(error.object) + error.start, error)
            return error.object[: error.start].decode("utf-8")

    def rest(self) -> str:
        """The text from the position on."""
        return self.text[self.position :]

    def move_to(self, position: int) -> None:
        """Moves forward to a position in `text`."""
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Skips white space; returns the character that is then at `position`, "" at the end."""
        while True:
            self.move_to(WHITE_SPACE.match(self.text, self.position).end())
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.grow()
