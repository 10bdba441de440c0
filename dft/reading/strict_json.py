"""Strict JSON: repeated keys, NaN, half surrogate pairs and deep nesting, which other readers accept, are refused."""

import json
import math
import re
from collections import Counter
from typing import Any

from dft.reading.row_memory import MAX_EXPANSION, expands_too_much
from dft.reading.rows import RowError, malformed

# Parsers, templates and our own functions recurse over nested values. At this depth all of them stay far below the
# limit of any interpreter, so whether a row is accepted doesn't depend on the machine.
MAX_NESTING = 100
TOO_DEEP = f"nested too deeply: at most {MAX_NESTING} lists and objects may stand inside each other"
TOO_MANY_VALUES = f"so many small values that they would take more than {MAX_EXPANSION} times the memory of their text"
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


class RepeatedKey(dict):
    """A JSON object that has one of its keys twice.

    Attributes:
        repeated: the keys that stand in it more than once.
    """

    __slots__ = ("repeated",)

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = Counter(key for key, _ in pairs)
        self.repeated = [key for key, times in keys.items() if times > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    return result if len(result) == len(pairs) else RepeatedKey(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)  # reads NaN and Infinity as floats; validate_value refuses them


def decode(text: str) -> Any:
    """Parses the JSON of a whole row; an object with a repeated key becomes a RepeatedKey.

    Raises:
        RowError: the text is not JSON, nested beyond the parser's own limit, or of very many very small values.
    """
    if expands_too_much(text):
        raise malformed(TOO_MANY_VALUES)
    try:
        value = DECODER.decode(text)
        if SURROGATE_ESCAPE.search(text):  # files are UTF-8, which can't hold half a pair: only an escape makes one
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("broken_json", "a string holds half of a surrogate pair (\\ud800 to \\udfff)") from error
    except (ValueError, RecursionError) as error:  # columns that are not used may be nested without limit
        raise RowError("broken_json", json_problem(error)) from error
    return value


def decode_text(text: str) -> Any:
    """Parses JSON that stands in a text of a row, such as the arguments of a tool call.

    Raises:
        RowError: the text is not JSON, or has more than MAX_NESTING levels.
    """
    if is_nested_too_deeply(text):
        raise malformed(TOO_DEEP)
    return decode(text)


def json_problem(error: Exception) -> str:
    """Describes an error of the JSON parser."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    return f"broken JSON: {error}"


def validate_value(value: Any, place: str, levels: int = MAX_NESTING) -> None:
    """Checks a parsed value, and everything inside it, for what strict JSON doesn't have.

    Args:
        place: names the value in an error.
        levels: how many lists and objects may stand inside each other.

    Raises:
        RowError: a repeated key, NaN or an infinity, or too many levels.
    """
    if isinstance(value, RepeatedKey):
        raise malformed(f"the key {value.repeated[0]!r} stands twice in one object")
    if isinstance(value, float) and not math.isfinite(value):
        raise malformed("NaN and Infinity are not JSON")
    if not isinstance(value, dict | list):
        return
    if levels == 0:
        raise malformed(f"{place} is {TOO_DEEP}")
    for item in value.values() if isinstance(value, dict) else value:
        if not isinstance(item, str):
            validate_value(item, place, levels - 1)


def is_nested_too_deeply(text: str) -> bool:
    """Whether JSON has more than MAX_NESTING levels; counts its brackets, so no parser can run out of stack."""
    if text.count("[") + text.count("{") <= MAX_NESTING or not text.lstrip().startswith(("[", "{")):
        return False
    depth = 0
    for token in STRING_OR_BRACKET.findall(text):
        if token in ("[", "{"):
            depth += 1
            if depth > MAX_NESTING:
                return True
        elif token in ("]", "}"):
            depth -= 1
    return False


def kind(value: Any) -> str:
    """Names the type of a JSON value, for an error."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value in ([], {}, ""):
        return f"empty ({names[type(value)]})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value!s:.60}"
    return names.get(type(value), f"of the type {type(value).__name__}")
