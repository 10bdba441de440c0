"""Output of a program that goes on when nobody reads it any more, as after `| head`, or when its disk is full."""

import io
import logging
import os
import sys

logger = logging.getLogger(__name__)


class LastingStream(io.TextIOWrapper):
    """stdout or stderr. What can't be written is dropped, like all that follows, and a warning says so."""

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Writes what is held back, or drops it."""
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # for libraries that write there themselves, too
        os.close(null)
        name = {1: "stdout", 2: "stderr"}.get(self.fileno(), "a stream")
        logger.warning(
            "%s can't be written (%s): the program goes on, and what follows is not shown", name, error.strerror
        )


def outlive_readers() -> None:
    """Makes stdout and stderr lasting, if they are what the interpreter made them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            settings = {key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")}
            setattr(sys, name, LastingStream(stream.buffer, **settings))
