"""Convert rows of the usual chat formats to conversations: checked strictly, kept word for word, or rejected.

    messages           messages: [{role, content}, ...], tools, chat_template_kwargs
    sharegpt           conversations: [{from, value}, ...], system, tools
    alpaca             instruction, input, output, system, history: [[question, answer], ...]
    prompt_completion  prompt and completion: texts, or lists of messages

Each row is checked by itself, so rows and files may disagree about the types of their columns.
"""

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dft.config.data import RESERVED_ARGUMENTS
from dft.reading.messages import decode_json_field, read_messages
from dft.reading.raw_rows import read_rows
from dft.reading.rows import Conversation, RawRow, RejectedRow, RowError, malformed
from dft.reading.strict_json import RepeatedKey, decode, kind, validate_value

COLUMNS = {  # the columns that tell a format from the others
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
USED_COLUMNS = {  # the columns that are checked and used; all others may hold anything
    "messages": ("messages", "tools", "functions", "chat_template_kwargs"),
    "sharegpt": ("conversations", "system", "tools", "chat_template_kwargs"),
    "alpaca": ("instruction", "input", "output", "system", "history", "chat_template_kwargs"),
    "prompt_completion": ("prompt", "completion", "tools", "chat_template_kwargs"),
}
MESSAGE_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # column: keys of its messages
PAIR = 2  # columns of text that a row needs to be a question with its answer
DETECTION_ROWS = 100  # the format of a file is detected from so many rows at its start
MAX_CHANNEL_LENGTH = 64  # characters; a longer text in the field `channel` is not the name of a source


# ---- one row ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one file, which all have the same format.

    Args:
        role_map: other names of roles, {name: role}.
    """

    path: str
    format: str
    role_map: dict[str, str]

    def read(self, raw: RawRow) -> Conversation | RejectedRow:
        """Parses and checks one row."""
        text = raw.text
        try:
            row = parse(raw)
            text = text or written_row(row)
            messages, tools, template_kwargs = self._columns(row)
        except RowError as error:
            return RejectedRow(self.path, raw.line, error.reason, error.detail, text, is_malformed=True)
        channel = _channel(row.get("channel"))
        return Conversation(messages, tools, template_kwargs, self.path, raw.line, text, channel)

    def _columns(self, row: Any) -> tuple[list[dict[str, Any]], list[dict] | None, dict[str, Any] | None]:
        """Messages, tools and template arguments of a parsed row."""
        used = USED_COLUMNS[self.format]
        check_object(row, used)
        missing = [column for column in COLUMNS[self.format] if column not in row]
        if missing:
            raise malformed(_missing(missing[0], row))
        row = {column: row.get(column) for column in used}
        for column, value in row.items():
            validate_value(value, repr(column))
        template_kwargs = _template_kwargs(row["chat_template_kwargs"])
        tools = _tools(row.get("tools") if row.get("tools") is not None else _functions(row.get("functions")))
        return CONVERTERS[self.format](row, self.role_map), tools, template_kwargs


def check_object(row: Any, columns: Collection[str]) -> None:
    """Raises RowError where a row is no JSON object, or has one of these columns twice."""
    if not isinstance(row, dict):
        raise malformed(f"a row must be a JSON object, not {kind(row)}")
    repeated = [key for key in row.repeated if key in columns] if isinstance(row, RepeatedKey) else []
    if repeated:
        raise malformed(f"the key {repeated[0]!r} stands twice in the row")


def _missing(column: str, row: dict) -> str:
    """The error for a missing column, with a hint where the file is of a known other kind."""
    found = ", ".join(map(repr, row)) or "nothing"
    if "chosen" in row and "rejected" in row:
        return f"no {column!r} (found {found}): this is preference data, which has two answers for a prompt"
    if any(all(name in row for name in keys) for keys in MESSAGE_KEYS.values()):
        return f"no {column!r} (found {found}): this is one message, and a row is a whole conversation"
    lists = [(key, value[0]) for key, value in row.items() if isinstance(value, list) and value]
    hint = next((_hint_at_list(key, first) for key, first in lists if isinstance(first, dict)), "")
    texts = [key for key, value in row.items() if isinstance(value, str)]
    if not hint and column == "messages" and len(texts) >= PAIR:
        hint = "; a question in one column and its answer in another become a chat by scripts/prepare_pairs.py"
    return f"no {column!r} (found {found}){hint}"


def _hint_at_list(key: str, first: dict) -> str:
    """What to do with a row that has a list of objects under a name that no format has, by the first of them."""
    for column, keys in MESSAGE_KEYS.items():
        if key == column:
            return f"; rows with {key!r} need a file of their own"
        if all(name in first for name in keys):
            return f"; the list under {key!r} seems to be the conversation: call it {column!r}"
    return f"; the rows seem to be the list under {key!r}: make that the file"


def _template_kwargs(kwargs: Any) -> dict[str, Any] | None:
    """The arguments that a row gives to its chat template; None for none."""
    if kwargs is not None and not isinstance(kwargs, dict):
        raise malformed(f"'chat_template_kwargs' must be an object, not {kind(kwargs)}")
    reserved = [name for name in kwargs or () if name in RESERVED_ARGUMENTS]
    if reserved:
        raise malformed(f"'chat_template_kwargs' can't hold {reserved[0]!r}, which the trainer gives the template")
    return kwargs or None


def _tools(tools: Any) -> list[dict] | None:
    """The tools of a row, None for none; ShareGPT keeps them as JSON in a text, and often as bare functions."""
    if isinstance(tools, str) and tools:
        tools = decode_json_field(tools, "'tools'")
    if tools not in (None, "") and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise malformed("'tools' must be a list of JSON schemas")
    if not tools:
        return None
    is_bare = [isinstance(tool.get("name"), str) and "function" not in tool for tool in tools]
    return [
        {"type": "function", "function": tool} if bare else tool for tool, bare in zip(tools, is_bare, strict=True)
    ]


def _functions(value: Any) -> Any:
    """The column `functions`, where OpenAI's older API has the tools; None where it holds something else."""
    is_list = isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value)
    return value if is_list else None


def _channel(value: Any) -> str:
    """The source that a row's field `channel` names; "" where it holds something else."""
    is_name = isinstance(value, str) and len(value) <= MAX_CHANNEL_LENGTH and value.isprintable()
    return value.strip() if is_name else ""


def parse(raw: RawRow) -> Any:
    """The value of a row, not yet checked.

    Raises:
        RowError: it couldn't be read, or its text is not JSON.
    """
    if raw.reason is not None:
        raise RowError(raw.reason, raw.detail)
    if raw.value is not None:
        return _without_nulls(raw.value)
    return decode(raw.text)


def written_row(value: Any) -> str:
    """A row of Parquet as a line of JSON; what JSON has no type for, such as a date, is written as a text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _without_nulls(value: Any) -> Any:
    """A value of Parquet without its nulls: a file has one schema, so keys that other rows have are filled in."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# ---- one file -----------------------------------------------------------------------------------


def detect_format(path: str) -> str:
    """Detects the format of a file by the columns of its first rows; "messages" if they fit no format.

    Raises:
        UserError: the file can't be opened.
    """
    for raw in islice(read_rows(path), DETECTION_ROWS):
        try:
            row = parse(raw)
        except RowError:
            continue
        if isinstance(row, dict):
            for name, columns in COLUMNS.items():
                if all(column in row for column in columns):
                    return name
    return "messages"


def read_file(
    path: str, data_format: str = "auto", role_map: dict[str, str] | None = None
) -> Iterator[Conversation | RejectedRow]:
    """Reads every row of a file, in order.

    Raises:
        UserError: the file can't be opened.
    """
    reader = RowReader(path, detect_format(path) if data_format == "auto" else data_format, role_map or {})
    return map(reader.read, read_rows(path))


# ---- the formats --------------------------------------------------------------------------------


def _from_messages(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    return read_messages(row["messages"], "messages", role_map)


def _from_sharegpt(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    messages = read_messages(row["conversations"], "conversations", role_map)
    if row["system"] and messages[0]["role"] == "system":
        raise malformed("there is a column 'system', and the conversation begins with a system message too")
    return _system(row) + messages


def _from_alpaca(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    history = [] if row["history"] in (None, "") else row["history"]
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise malformed("'history' must be a list of [question, answer]")
    question = _text(row, "instruction")
    if row["input"] not in (None, ""):
        question = f"{question}\n{_text(row, 'input')}" if question else _text(row, "input")
    turns = [*history, [question, _text(row, "output")]]
    if not all(isinstance(text, str) for turn in turns for text in turn):
        raise malformed("'history' must hold texts")
    return _system(row) + [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _from_prompt_completion(row: dict[str, Any], role_map: dict[str, str]) -> list[dict[str, Any]]:
    """Assistant turns of the prompt are context: their weight is 0, so they are not trained on."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise malformed("'prompt' and 'completion' must both be text, or both be lists of messages")
    context = read_messages(prompt, "prompt", role_map)
    context = [{**m, "weight": 0.0} if m["role"] == "assistant" else m for m in context]
    return context + read_messages(completion, "completion", role_map)


CONVERTERS: dict[str, Callable[[dict[str, Any], dict[str, str]], list[dict[str, Any]]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    text = "" if row["system"] is None else _text(row, "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _text(row: dict[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise malformed(f"{column!r} must be text, not {kind(row[column])}")
    return row[column]
