"""Tool calls that an answer makes, read from its text: JSON arguments, with the tool's name beside or before them.

    {"name": …, "arguments": {…}}        Qwen, Hermes, Mistral (in a list); Llama and Command R with "parameters"
    NAME[ARGS]{…}                        newer versions of Mistral
    NAME<｜tool▁sep｜>{…}                 DeepSeek-V3.1; V3 and R1 have the arguments in a code block
    NAME and {…} on the next line        GLM-4, where nothing stands before the name
    to=functions.NAME … <|message|>{…}   gpt-oss

Calls that a template writes in another language, such as tags for each argument, aren't read.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from dft.reading.messages import function_of
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text

NAME_KEYS, ARGUMENT_KEYS = ("name", "tool_name"), ("arguments", "parameters")
TOOL = r"([A-Za-z_][\w.-]*)"
NAME_BEFORE = re.compile(
    rf"{TOOL}(?:\[ARGS\]|<｜tool▁sep｜>)\Z|<｜tool▁sep｜>{TOOL}\n```json\n\Z|\A\s*{TOOL}\n\Z"
    rf"|to=functions\.{TOOL}[^{{}}]*<\|message\|>\Z"
)
NEARBY = 200  # characters before the arguments in which the name is looked for
DECODER = json.JSONDecoder()
MAX_FAILURES = 1000  # brackets that begin no JSON, after which a text isn't read on: it repeats itself

Call = tuple[str, Any]  # the name of the tool, and its arguments as a JSON value


def calls_in(text: str) -> list[Call]:
    """The calls in a text, in their order; empty if there is none."""
    calls: list[Call] = []
    end = 0
    for start, stop, value in _json_values(text):
        own = list(_calls_of_value(value))
        nearby = text[max(end, start - NEARBY) : start]
        before = NAME_BEFORE.search(nearby) if isinstance(value, dict) and not own else None
        calls += own if before is None else [(next(filter(None, before.groups())), value)]
        end = stop
    return calls


def calls_of(message: dict[str, Any]) -> list[Call]:
    """The calls of an assistant message."""
    functions = map(function_of, message.get("tool_calls") or [])
    return [(function["name"], _arguments(function.get("arguments"))) for function in functions]


def _json_values(text: str) -> Iterator[tuple[int, int, Any]]:
    """The JSON objects and lists in a text, from left to right, and the characters [start, stop) of each.

    What is inside one isn't returned by itself.
    """
    position = failures = 0
    while failures < MAX_FAILURES and (start := _next_bracket(text, position)) >= 0:
        try:
            value, position = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            position, failures = start + 1, failures + 1
        else:
            yield start, position, value


def _next_bracket(text: str, position: int) -> int:
    places = [place for place in (text.find("{", position), text.find("[", position)) if place >= 0]
    return min(places, default=-1)


def _calls_of_value(value: Any) -> Iterator[Call]:
    for item in value if isinstance(value, list) else [value]:
        function = function_of(item)
        name = next((function[key] for key in NAME_KEYS if isinstance(function.get(key), str)), None)
        key = next((key for key in ARGUMENT_KEYS if key in function), None)
        if name is not None and key is not None:
            yield name, _arguments(function[key])


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
