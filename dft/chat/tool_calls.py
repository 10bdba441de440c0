"""Arguments of tool calls, as objects or as JSON in a text: templates differ in what they take."""

import json

from dft.reading.messages import function_of
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text


def with_arguments(messages: list[dict], as_text: bool) -> list[dict]:
    """Converts the arguments of every tool call to JSON in a text, or from that to objects where they are objects."""
    if not any(message.get("tool_calls") for message in messages):
        return messages
    return [
        {**message, "tool_calls": [_with_arguments(call, as_text) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_arguments(call: dict, as_text: bool) -> dict:
    function = function_of(call)
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = _as_object(arguments)
    function = {**function, "arguments": arguments} if "arguments" in function else function
    return {**call, "function": function} if "function" in call else function


def _as_object(text: str) -> dict | str:
    """The object that a text holds as JSON; the text itself if it holds none, or a key twice."""
    try:
        value = decode_text(text)
    except RowError:
        return text
    return value if type(value) is dict else text
