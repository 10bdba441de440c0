"""Rows of the usual chat formats to conversations: checked strictly, kept word for word, or refused.

    messages           messages: [{role, content}, …], tools, chat_template_kwargs
    sharegpt           conversations: [{from, value}, …], system, tools
    alpaca             instruction, input, output, system, history: [[question, answer], …]
    prompt_completion  prompt and completion: texts, or lists of messages

A row is checked by itself, so columns that clash between rows or files never matter.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dft.reading.files import RawRow, read_rows
from dft.reading.strict_json import MalformedRow, RepeatedKey, decode, kind, refuse_odd_values

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion")
COLUMNS = {  # that a format is known by
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
USED_COLUMNS = {  # that must hold what the format says; others may hold anything
    "messages": ("messages", "tools", "chat_template_kwargs"),
    "sharegpt": ("conversations", "system", "tools", "chat_template_kwargs"),
    "alpaca": ("instruction", "input", "output", "system", "history", "chat_template_kwargs"),
    "prompt_completion": ("prompt", "completion", "tools", "chat_template_kwargs"),
}
TAKEN_ARGUMENTS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversations",
    "messages",
    "return_assistant_tokens_mask",
    "tools",
)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "assistant",  # its value is the call
}
ROWS_TO_LOOK_AT = 100  # to tell a file's format
MAX_CHANNEL_LENGTH = 64  # of the field `channel`, in characters; a longer text is no name


@dataclass
class Conversation:
    """One valid row: messages of role and content (text), with what a chat template may want of it.

    An assistant message may have `weight`, a number of at least 0 that its loss is multiplied by.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    template_kwargs: dict[str, Any] | None
    path: str
    line: int  # of its first character, from 1
    row: str  # its text, as it stands in the file
    channel: str = ""  # what its own field `channel` names, "" for none


@dataclass
class RejectedRow:
    """One row that is not trained on."""

    path: str
    line: int
    reason: str  # short, to count by
    detail: str
    row: str  # its text, as it stands in the file
    is_malformed: bool  # broken, as against nothing to learn from

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.detail}"


# ---- one row ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one file, all of one format.

    Args:
        role_map: other names of roles, {name: role}.
    """

    path: str
    format: str
    role_map: dict[str, str]

    def read(self, raw: RawRow) -> Conversation | RejectedRow:
        """The conversation that a row holds, or why it holds none."""
        if raw.reason is not None:
            return RejectedRow(self.path, raw.line, raw.reason, raw.detail, raw.text, is_malformed=True)
        try:
            row = parse(raw)
        except MalformedRow as error:
            return RejectedRow(self.path, raw.line, "broken_json", str(error), raw.text, is_malformed=True)
        text = raw.text or json.dumps(row, ensure_ascii=False, default=str)
        try:
            messages, tools, kwargs = self._conversation(row)
            channel = _channel(row.get("channel"))
            return Conversation(messages, tools or None, kwargs or None, self.path, raw.line, text, channel)
        except MalformedRow as error:
            return RejectedRow(self.path, raw.line, "malformed_row", str(error), text, is_malformed=True)
        except RecursionError:
            return RejectedRow(self.path, raw.line, "malformed_row", "nested too deeply", text, is_malformed=True)

    def _conversation(self, row: Any) -> tuple[list[dict[str, Any]], Any, Any]:
        """Messages, tools and template arguments of one parsed row."""
        if not isinstance(row, dict):
            raise MalformedRow(f"a row must be a JSON object, not {kind(row)}")
        used = USED_COLUMNS[self.format]
        repeated = [key for key in row.repeated if key in used] if isinstance(row, RepeatedKey) else []
        if repeated:
            raise MalformedRow(f"the key {repeated[0]!r} stands twice in the row")
        missing = [column for column in COLUMNS[self.format] if column not in row]
        if missing:
            raise MalformedRow(_missing(missing[0], row))
        row = {column: row.get(column) for column in used}
        refuse_odd_values(list(row.values()))
        kwargs = row["chat_template_kwargs"]
        if kwargs is not None and not isinstance(kwargs, dict):
            raise MalformedRow(f"'chat_template_kwargs' must be an object, not {kind(kwargs)}")
        taken = [name for name in kwargs or () if name in TAKEN_ARGUMENTS]
        if taken:
            raise MalformedRow(f"'chat_template_kwargs' can't hold {taken[0]!r}, which the trainer gives the template")
        return CONVERTERS[self.format](row, self.role_map), _tools(row.get("tools")), kwargs


def _missing(column: str, row: dict) -> str:
    found = ", ".join(map(repr, row)) or "nothing"
    if "chosen" in row and "rejected" in row:
        return f"no {column!r} (found {found}): this is preference data, which has two answers for a prompt"
    wrapped = [k for k, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    hint = f"; the rows seem to be the list under {wrapped[0]!r}: make that the file" if wrapped else ""
    return f"no {column!r} (found {found}){hint}"


def _channel(value: Any) -> str:
    """The source that a row's field `channel` names; "" where it holds something else."""
    is_name = isinstance(value, str) and len(value) <= MAX_CHANNEL_LENGTH and value.isprintable()
    return value.strip() if is_name else ""


def detect_format(path: str) -> str:
    """The format of a file, told by the columns of its first rows; messages if they tell nothing.

    Raises:
        UserError: the file can't be opened.
    """
    for raw in islice(read_rows(path), ROWS_TO_LOOK_AT):
        try:
            row = parse(raw)
        except MalformedRow:
            continue
        if isinstance(row, dict):
            for name, columns in COLUMNS.items():
                if all(column in row for column in columns):
                    return name
    return "messages"


def read_file(path: str, data_format: str = "auto", role_map: dict[str, str] | None = None) -> Iterator:
    """Every row of a file as a Conversation or a RejectedRow, in order.

    Raises:
        UserError: the file can't be opened.
    """
    reader = RowReader(path, detect_format(path) if data_format == "auto" else data_format, role_map or {})
    return map(reader.read, read_rows(path))


def parse(raw: RawRow) -> Any:
    """The value of a row.

    Raises:
        MalformedRow: it is not JSON.
    """
    if raw.value is not None:
        return _without_nulls(raw.value)
    return decode(raw.text)


def _without_nulls(value: Any) -> Any:
    """A value of Parquet without the nulls that its one schema for all rows fills in."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# ---- the formats --------------------------------------------------------------------------------


def _from_messages(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    return _messages(row["messages"], "messages", role_map)


def _from_sharegpt(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    messages = _messages(row["conversations"], "conversations", role_map)
    if row["system"] and messages[0]["role"] == "system":
        raise MalformedRow("there is a column 'system', and the conversation begins with a system message too")
    return _system(row) + messages


def _from_alpaca(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    history = [] if row["history"] in (None, "") else row["history"]
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise MalformedRow("'history' must be a list of [question, answer]")
    question = _text(row, "instruction")
    if row["input"] not in (None, ""):
        question = f"{question}\n{_text(row, 'input')}" if question else _text(row, "input")
    turns = [*history, [question, _text(row, "output")]]
    if not all(isinstance(text, str) for turn in turns for text in turn):
        raise MalformedRow("'history' must hold texts")
    return _system(row) + [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _from_prompt_completion(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    """The assistant's turns of the prompt are context: they are not trained on."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise MalformedRow("'prompt' and 'completion' must both be text, or both be lists of messages")
    context = _messages(prompt, "prompt", role_map)
    return [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in context] + _messages(
        completion, "completion", role_map
    )


CONVERTERS: dict[str, Callable[[dict[str, Any], dict[str, str]], list[dict[str, Any]]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text(row, "system")}] if row["system"] not in (None, "") else []


def _text(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise MalformedRow(f"{column!r} must be text, not {kind(row[column])}")
    return row[column]


def _tools(tools: Any) -> list[dict] | None:
    """The tools of a row; ShareGPT has them as JSON in a text."""
    if isinstance(tools, str) and tools:
        tools = _json_in_text(tools, "'tools'")
    if tools not in (None, "") and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise MalformedRow("'tools' must be a list of JSON schemas")
    return tools or None


def _json_in_text(text: str, what: str) -> Any:
    try:
        value = decode(text)
        refuse_odd_values(value)
    except MalformedRow as error:
        raise MalformedRow(f"{what} is a text that isn't JSON ({error})") from error
    return value


# ---- messages -----------------------------------------------------------------------------------


def _messages(messages: Any, column: str, role_map: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise MalformedRow(f"{column!r} must be a list of messages, not {kind(messages)}")
    return [_message(message, f"{column}[{i}]", role_map) for i, message in enumerate(messages)]


def _message(message: Any, place: str, role_map: dict[str, str]) -> dict[str, Any]:
    """A message of role and content, whether it is written so or as ShareGPT's from and value."""
    if not isinstance(message, dict):
        raise MalformedRow(f"{place} must be an object with role and content, not {kind(message)}")
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "from" in message and "role" not in message:
        message = _from_value(message, place, role_map)
    role = message.get("role")
    role = role_map.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise MalformedRow(f"{place} has the role {role!r:.60}; allowed are {', '.join(ROLES)} (--role_map NAME=ROLE)")
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(function_of(c).get("name"), str) for c in calls)
    ):
        raise MalformedRow(f"{place}: 'tool_calls' must be a list of calls, each with a function name")
    reasoning = message.get("reasoning_content", "")
    if not isinstance(reasoning, str):
        raise MalformedRow(f"{place}: 'reasoning_content' must be text, not {kind(reasoning)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, place) for part in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise MalformedRow(f"{place}: 'content' must be text, not {kind(content)}")
    return {**message, "role": role, "content": content, **_weight(message, place)}


def _from_value(message: dict[str, Any], place: str, role_map: dict[str, str]) -> dict[str, Any]:
    """A ShareGPT message with role and content; a function call becomes a tool call."""
    name, value = message["from"], message.get("value")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if name == "function_call" and name not in role_map:
        calls = _json_in_text(value, f"{place}: the function call") if isinstance(value, str) else value
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {**rest, "role": "assistant", "content": None, "tool_calls": calls}
    role = role_map.get(name, SHAREGPT_ROLES.get(name, name)) if isinstance(name, str) else name
    return {**rest, "role": role, "content": value}


def _weight(message: dict[str, Any], place: str) -> dict[str, float]:
    """{"weight": …} if the message says how much it counts: by `weight`, or by `train`: true or false."""
    train, weight = message.get("train", True), message.get("weight", 1.0)
    if not isinstance(train, bool):
        raise MalformedRow(f"{place}: 'train' must be true or false, not {kind(train)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= sys.float_info.max:
        raise MalformedRow(f"{place}: 'weight' must be a number of at least 0, not {kind(weight)}")
    if "train" not in message and "weight" not in message:
        return {}
    return {"weight": float(weight) if train else 0.0}


def function_of(call: Any) -> dict:
    """The function of a tool call, written {"function": {"name": …}} or {"name": …}."""
    call = call if isinstance(call, dict) else {}
    return call["function"] if isinstance(call.get("function"), dict) else call


def _text_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise MalformedRow(f"{place}: only text parts are supported in 'content', not {str(part)[:60]!r}")
