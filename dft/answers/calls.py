"""Tool calls that an answer makes, read from its text: JSON objects with a name and arguments.

So most templates write them: Qwen's and Hermes' between <tool_call> and </tool_call>, Mistral's in a list, Llama's
bare and with "parameters". Templates that write calls in a language of their own aren't read.
"""

import json
from collections.abc import Iterator
from typing import Any

from dft.reading.messages import function_of
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text

ARGUMENT_KEYS = ("arguments", "parameters")
DECODER = json.JSONDecoder()
MAX_FAILURES = 1000  # brackets that begin no JSON, after which a text isn't read on: it repeats itself

Call = tuple[str, Any]  # the name of the tool, and its arguments as a JSON value


def calls_in(text: str) -> list[Call]:
    """The calls in a text, in their order; empty if there is none."""
    return [call for value in _json_values(text) for call in _calls_of_value(value)]


def calls_of(message: dict[str, Any]) -> list[Call]:
    """The calls of an assistant message."""
    functions = map(function_of, message.get("tool_calls") or [])
    return [(function["name"], _arguments(function.get("arguments"))) for function in functions]


def _json_values(text: str) -> Iterator[Any]:
    """The JSON objects and lists in a text, from left to right; what is inside one isn't returned by itself."""
    position = failures = 0
    while failures < MAX_FAILURES and (start := _next_bracket(text, position)) >= 0:
        try:
            value, position = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position, failures = start + 1, failures + 1
        else:
            yield value


def _next_bracket(text: str, position: int) -> int:
    places = [place for place in (text.find("{", position), text.find("[", position)) if place >= 0]
    return min(places, default=-1)


def _calls_of_value(value: Any) -> Iterator[Call]:
    for item in value if isinstance(value, list) else [value]:
        function = function_of(item)
        key = next((key for key in ARGUMENT_KEYS if key in function), None)
        if isinstance(function.get("name"), str) and key is not None:
            yield function["name"], _arguments(function[key])


def _arguments(value: Any) -> Any:
    """Arguments as a JSON value; some APIs and models write them as JSON in a text."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    try:
        return decode_text(value)
    except RowError:
        return value
