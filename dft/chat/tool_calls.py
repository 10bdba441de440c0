"""Tool calls as a template takes them: arguments as objects or as JSON in a text, and ids that it accepts."""

import hashlib
import json
import re

from dft.reading.messages import function_of
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text

SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


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


def with_short_ids(messages: list[dict]) -> list[dict]:
    """Gives every tool call an id of nine letters and digits, as Mistral's templates want it, and its result the same.

    An id of that form is kept; another one, or a missing one, is replaced by a digest of itself and of its place.
    """
    made: list[dict] = []
    of_id: dict[str, str] = {}  # id in the data -> its replacement
    waiting: list[str] = []  # ids of calls whose results have none in the data, in order
    for number, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if calls:
            ids = [_short_id(call.get("id"), number, i) for i, call in enumerate(calls)]
            of_id |= {str(call["id"]): new for call, new in zip(calls, ids, strict=True) if call.get("id")}
            waiting = list(ids)
            message = {**message, "tool_calls": [{**call, "id": new} for call, new in zip(calls, ids, strict=True)]}
        elif message["role"] == "tool":
            own = of_id.get(str(message.get("tool_call_id")))
            new = own or (waiting[0] if waiting else _short_id(None, number, 0))
            waiting = [other for other in waiting if other != new]
            message = {**message, "tool_call_id": new}
        made.append(message)
    return made


def _short_id(own: object, number: int, index: int) -> str:
    if isinstance(own, str) and SHORT_ID.fullmatch(own):
        return own
    return hashlib.sha256(f"{own} {number} {index}".encode()).hexdigest()[:9]


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
