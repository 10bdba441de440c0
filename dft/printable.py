"""Text from outside, such as names of files, made safe to print, to log and to write into documents."""

import re

# What a terminal obeys (control characters, which ESC is among), what ends a line, what reorders the text around it
# (bidirectional overrides), and half surrogate pairs, which UTF-8 can't hold
_UNSAFE = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_NAMES = re.compile(f"[{_UNSAFE}\n\t]")
_IN_LINES = re.compile(f"[{_UNSAFE}]")


def printable(text: object, *, lines: bool = False) -> str:
    """A text with the characters escaped that could forge what stands around it.

    Args:
        text: anything whose str is printed.
        lines: it may have several lines, and tabs.
    """
    unsafe = _IN_LINES if lines else _IN_NAMES
    return unsafe.sub(lambda match: ascii(match[0])[1:-1], str(text))
