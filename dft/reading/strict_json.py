"""JSON read strictly: what other readers pass over (a repeated key, NaN, half a surrogate pair) is found."""

import json
import math
import re
from collections import Counter
from typing import Any

SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class MalformedRow(ValueError):
    """What is wrong with one row."""


class RepeatedKey(dict):
    """A JSON object that names one of its keys twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = Counter(key for key, _ in pairs)
        self.repeated = [key for key, times in keys.items() if times > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    return result if len(result) == len(pairs) else RepeatedKey(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)  # NaN and Infinity become floats, see refuse_odd_values


def decode(text: str) -> Any:
    """The value of strict JSON; a repeated key makes a RepeatedKey.

    Raises:
        MalformedRow: it is not JSON.
    """
    try:
        value = DECODER.decode(text)
        if SURROGATE_ESCAPE.search(text):  # UTF-8 holds no half of a pair, only an escape can make one
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedRow("a string holds half of a surrogate pair (\\ud800 to \\udfff)") from error
    except (ValueError, RecursionError) as error:
        raise MalformedRow(json_problem(error)) from error
    return value


def json_problem(error: Exception) -> str:
    """What is wrong with JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    return f"broken JSON: {error}"


def refuse_odd_values(value: Any) -> None:
    """Raises MalformedRow for a repeated key or a number that JSON doesn't have, anywhere inside `value`."""
    if isinstance(value, RepeatedKey):
        raise MalformedRow(f"the key {value.repeated[0]!r} stands twice in one object")
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedRow("NaN and Infinity are not JSON")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if not isinstance(item, str):
            refuse_odd_values(item)


def kind(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value in ([], {}, ""):
        return f"empty ({names[type(value)]})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value!s:.60}"
    return names.get(type(value), f"of the type {type(value).__name__}")
