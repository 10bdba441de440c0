"""Messages of a row, checked one by one; each gets a role that is known and a content that is text."""

import sys
from typing import Any

from dft.config.data import ROLES
from dft.reading.rows import RowError, malformed
from dft.reading.strict_json import TOO_DEEP, decode, is_nested_too_deeply, kind, validate_value

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",  # the value of this message is the call itself
}
OLDER_ROLES = {"function": "tool"}  # OpenAI's older API
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # what servers and templates call it


def read_messages(messages: Any, column: str, role_map: dict[str, str]) -> list[dict[str, Any]]:
    """The messages that a column holds, each with role and content.

    Args:
        messages: the value of the column, as parsed.
        role_map: other names of roles, {name: role}.

    Raises:
        RowError: it is no list of messages, or one of them is malformed.
    """
    if not isinstance(messages, list) or not messages:
        raise malformed(f"{column!r} must be a list of messages, not {kind(messages)}")
    read = [_read_message(message, f"{column}[{i}]", role_map) for i, message in enumerate(messages)]
    if read[0]["role"] in ("system", "developer") and not read[0]["content"].strip() and len(read) > 1:
        return read[1:]  # it says nothing, and templates differ in what they make of it
    return read


def _read_message(message: Any, place: str, role_map: dict[str, str]) -> dict[str, Any]:
    """A message with role and content; ShareGPT writes it with from and value."""
    if not isinstance(message, dict):
        raise malformed(f"{place} must be an object with role and content, not {kind(message)}")
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, place, role_map)
    role = message.get("role")
    role = role_map.get(role, OLDER_ROLES.get(role, role)) if isinstance(role, str) else role
    if role not in ROLES:
        raise malformed(f"{place} has the role {role!r:.60}; allowed are {', '.join(ROLES)} (--role_map NAME=ROLE)")
    message = _with_tool_calls(message, place)
    message = _with_one_reasoning(message, place)
    may_be_null = role == "assistant" and "tool_calls" in message
    content = _content(message.get("content"), place, may_be_null)
    return {**message, "role": role, "content": content, **_loss_weight(message, place)}


def is_empty(message: dict[str, Any]) -> bool:
    """Whether an assistant message says nothing: no text but white space, no reasoning and no tool call."""
    return not (
        (message["content"] or "").strip()
        or message.get("tool_calls")
        or any((message.get(key) or "").strip() for key in REASONING_KEYS)
    )


def _from_sharegpt(message: dict[str, Any], place: str, role_map: dict[str, str]) -> dict[str, Any]:
    """A ShareGPT message with role and content; a function call becomes a tool call."""
    name, value = message["from"], message.get("value")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if name == "function_call" and name not in role_map:
        calls = decode_json_field(value, f"{place}: the function call") if isinstance(value, str) else value
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {**rest, "role": "assistant", "content": None, "tool_calls": calls}
    role = role_map.get(name, SHAREGPT_ROLES.get(name, name)) if isinstance(name, str) else name
    return {**rest, "role": role, "content": value}


def _with_tool_calls(message: dict[str, Any], place: str) -> dict[str, Any]:
    """The message with `tool_calls` only where it has calls; OpenAI's older API has one `function_call`."""
    if "tool_calls" not in message and "function_call" not in message:
        return message
    function, calls = message.get("function_call"), message.get("tool_calls")
    if calls not in (None, []):
        _check_tool_calls(calls, place)
        if function:
            raise malformed(f"{place} has both 'tool_calls' and 'function_call'")
        return message
    message = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    if not function:
        return message
    calls = [{"type": "function", "function": function}]
    _check_tool_calls(calls, place)
    return {**message, "tool_calls": calls}


def _with_one_reasoning(message: dict[str, Any], place: str) -> dict[str, Any]:
    """The message with its reasoning under `reasoning_content`, whatever it is called there."""
    found = [key for key in REASONING_KEYS if key in message]
    texts = [message[key] for key in found if isinstance(message[key], str) and message[key].strip()]
    if "reasoning_content" in found and not isinstance(message["reasoning_content"], str):
        raise malformed(f"{place}: 'reasoning_content' must be text, not {kind(message['reasoning_content'])}")
    if len({text.strip() for text in texts}) > 1:
        raise malformed(f"{place} has different texts under {' and '.join(map(repr, found))}")
    if found in ([], ["reasoning_content"]):
        return message
    rest = {key: value for key, value in message.items() if key not in found or not isinstance(value, str)}
    return {**rest, "reasoning_content": texts[0]} if texts else rest


def _check_tool_calls(calls: Any, place: str) -> None:
    if not isinstance(calls, list) or not all(isinstance(function_of(c).get("name"), str) for c in calls):
        raise malformed(f"{place}: 'tool_calls' must be a list of calls, each with a function name")
    for function in map(function_of, calls):
        arguments = function.get("arguments")  # these are often JSON in a text, which is parsed for the template
        if isinstance(arguments, str) and is_nested_too_deeply(arguments):
            raise malformed(f"{place}: the JSON of the arguments of {function['name']!r:.60} is {TOO_DEEP}")


def _content(content: Any, place: str, may_be_null: bool) -> str:
    if isinstance(content, list):
        content = "".join(_text_part(part, place) for part in content)
    if content is None and may_be_null:
        return ""
    if not isinstance(content, str):
        raise malformed(f"{place}: 'content' must be text, not {kind(content)}")
    return content


def _text_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise malformed(f"{place}: only text parts are supported in 'content', not {str(part)[:60]!r}")


def _loss_weight(message: dict[str, Any], place: str) -> dict[str, float]:
    """{"weight": ...} where the message has the key `weight` or `train` (true or false), else nothing."""
    train, weight = message.get("train", True), message.get("weight", 1.0)
    if not isinstance(train, bool):
        raise malformed(f"{place}: 'train' must be true or false, not {kind(train)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= sys.float_info.max:
        raise malformed(f"{place}: 'weight' must be a number of at least 0, not {kind(weight)}")
    if "train" not in message and "weight" not in message:
        return {}
    return {"weight": float(weight) if train else 0.0}


def function_of(call: Any) -> dict:
    """The function of a tool call, which is written {"function": {"name": ...}} or {"name": ...}."""
    call = call if isinstance(call, dict) else {}
    return call["function"] if isinstance(call.get("function"), dict) else call


def decode_json_field(text: str, place: str) -> Any:
    """The JSON value that the format keeps in a text.

    Args:
        place: names the text in an error.

    Raises:
        RowError: the text is not strict JSON, or nested too deeply.
    """
    if is_nested_too_deeply(text):
        raise malformed(f"{place} is {TOO_DEEP}")
    try:
        value = decode(text)
        validate_value(value, place)
    except RowError as error:
        raise malformed(f"{place} is a text that isn't JSON ({error.detail})") from error
    return value
