"""The memory that a row of JSON takes once it is parsed, estimated before it is.

An empty object is two characters in a file and some eighty bytes in Python, so that a row within the limit of its size
could take a hundred times as much memory.
"""

import re
import sys

MAX_EXPANSION = 12  # bytes of memory for a byte of a row
UNCHECKED = 1 << 19  # characters; what they can become is little, whatever they are
ALWAYS_ALLOWED = 4 << 20  # characters of a row that may always take as much as MAX_EXPANSION says
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
SEGMENT = re.compile(r'(?:[^"]*+"(?:[^"\\]++|\\.)*+"?){1,10000}', re.DOTALL)  # that doesn't end inside a string
# bytes of an object, of a key and its value in one, of a list, and of an item with its place in what holds it
OBJECT_BYTES, KEY_BYTES, LIST_BYTES, ITEM_BYTES = 190, 90, 64, 56


def expands_too_much(text: str) -> bool:
    """Whether the values of a row's JSON would take much more memory than text of its length does."""
    if len(text) <= UNCHECKED:
        return False
    size = max(len(text), ALWAYS_ALLOWED)
    # the bytes that were read, the text, and the strings in it, which take as much as the text again
    left = max(3 * size, (MAX_EXPANSION - 1) * size - 2 * sys.getsizeof(text))
    if _bytes_of_values(text) <= left:
        return False
    end = 0
    for segment in SEGMENT.finditer(text, 0, text.rfind('"') + 1):  # what stands inside strings is no value
        left -= _bytes_of_values(STRING.sub("", segment[0]))
        end = segment.end()
        if left < 0:
            return True
    return _bytes_of_values(text[end:]) > left


def _bytes_of_values(text: str) -> int:
    in_lists = ITEM_BYTES * text.count(",") + LIST_BYTES * text.count("[")
    return in_lists + OBJECT_BYTES * text.count("{") + KEY_BYTES * text.count(":")
