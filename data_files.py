"""Reading chat files strictly: every row is kept word for word, or refused with its file, line and reason.

`load_dataset("json")` is not used: it guesses one schema for a file and rewrites text to fit it. Here a
row is parsed by itself, so columns that clash between rows or files never matter.
"""

import glob
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_logger import UserError

SUFFIXES = (".json", ".jsonl")
WHITESPACE = re.compile(r"[ \t\r\n]*")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
USED_COLUMNS = ("messages", "tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass
class Conversation:
    """One valid row: messages of role and content (text), with what a chat template may want of it."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    template_kwargs: dict[str, Any] | None
    path: str
    line: int  # of its first character, from 1
    row: str  # its text, as it stands in the file


@dataclass
class Rejected:
    """One row that is not trained on."""

    path: str
    line: int
    reason: str  # short, to count by
    detail: str
    row: str  # its text, as it stands in the file
    is_malformed: bool  # broken, as against nothing to learn from

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.detail}"


class MalformedRow(ValueError):
    """What is wrong with one row."""


class BrokenArray(MalformedRow):
    """What is wrong with an array, of which nothing more can be read."""


class RepeatedKey(dict):
    """A JSON object that names one of its keys twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.key = next(key for key in keys if keys.count(key) > 1)


def find_data_files(patterns: list[str], flag: str) -> list[str]:
    """Paths of the .json and .jsonl files that files, directories and globs name, in order, each once.

    Raises:
        UserError: some of them name nothing, or a file of another kind; all are listed.
    """
    found: dict[Path, str] = {}
    problems = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = sorted(str(p) for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        elif path.is_file():
            files = [str(path)]
        else:
            files = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if not files:
            what = f"no {' or '.join(SUFFIXES)} file in this directory" if path.is_dir() else "no such file"
            problems.append(f"  {pattern}: {what}")
        problems += [f"  {f}: not a {' or '.join(SUFFIXES)} file" for f in files if Path(f).suffix not in SUFFIXES]
        for f in files:
            found.setdefault(Path(f).resolve(), f)
    if problems:
        raise UserError(f"--{flag}:\n" + "\n".join(problems))
    return list(found.values())


def read_rows(path: str) -> Iterator[Conversation | Rejected]:
    """The rows of one file: a JSON array, or one JSON object on each line; whichever its first character says.

    Blank lines, a byte-order mark and Windows line ends are fine.
    """
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        detail = f"not UTF-8 at byte {error.start} ({error.reason}): convert the file with `iconv -t UTF-8`"
        yield Rejected(path, line, "unreadable_file", detail, "", True)
        return
    stripped = text.lstrip()
    if not stripped:
        yield Rejected(path, 1, "empty_file", "the file is empty", "", True)
        return
    is_empty = True
    for line, raw, parsed in _array_items(text) if stripped[0] == "[" else _lines(text):
        is_empty = False
        if isinstance(parsed, MalformedRow):
            reason = "rest_of_file_unread" if isinstance(parsed, BrokenArray) else "broken_json"
            yield Rejected(path, line, reason, str(parsed), raw, True)
            continue
        try:
            yield to_conversation(parsed, path, line, raw)
        except MalformedRow as error:
            yield Rejected(path, line, "malformed_row", str(error), raw, True)
        except RecursionError:
            yield Rejected(path, line, "malformed_row", "nested too deeply", raw, True)
    if is_empty:
        yield Rejected(path, 1, "empty_file", "the file holds an empty list", "", True)


def _lines(text: str) -> Iterator[tuple[int, str, Any]]:
    """Line number, text and parsed value (or MalformedRow) of every line that is not blank."""
    # not str.splitlines: it also cuts at U+2028 and others, which JSON allows inside strings
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line, _parse(line)


def _array_items(text: str) -> Iterator[tuple[int, str, Any]]:
    """Line number, text and parsed value of every item of a JSON array; ends at the first broken one."""
    number = 1  # of the line that `position` is on
    position = 0

    def move_to(new_position: int) -> None:
        nonlocal number, position
        number += text.count("\n", position, new_position)
        position = new_position

    def broken(detail: str) -> tuple[int, str, BrokenArray]:
        return number, text[position:], BrokenArray(f"{detail}; the rest of the file is not read")

    move_to(text.index("[") + 1)
    needs_item = False  # after a comma
    while True:
        move_to(WHITESPACE.match(text, position).end())
        if text[position : position + 1] == "]" and not needs_item:
            break
        try:
            value, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield broken(_json_problem(error))
            return
        yield number, text[position:end], _refuse_lone_surrogates(value, text[position:end])
        move_to(WHITESPACE.match(text, end).end())
        needs_item = text[position : position + 1] == ","
        if needs_item:
            move_to(position + 1)
        elif text[position : position + 1] != "]":
            yield broken("a comma or the closing ] is missing")
            return
    if text[position + 1 :].strip():
        yield broken("text after the end of the JSON array")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    return result if len(result) == len(pairs) else RepeatedKey(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)  # NaN and Infinity become floats, see _refuse_odd_values


def _parse(text: str) -> Any:
    try:
        return _refuse_lone_surrogates(DECODER.decode(text), text)
    except (ValueError, RecursionError) as error:
        return MalformedRow(_json_problem(error))


def _refuse_lone_surrogates(value: Any, text: str) -> Any:
    """`value`, or MalformedRow if a string in it is half of a surrogate pair, which no tokenizer can encode."""
    if SURROGATE_ESCAPE.search(text):  # UTF-8 holds none, so only an escape can make one
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return MalformedRow("a string holds half of a surrogate pair (\\ud800 to \\udfff)")
    return value


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    return f"broken JSON: {error}"


def to_conversation(row: Any, path: str, line: int, text: str) -> Conversation:
    """Checks one parsed row, whose text in the file is `text`.

    Raises:
        MalformedRow: with what is wrong about the columns that are used; others may hold anything.
    """
    if not isinstance(row, dict):
        raise MalformedRow(f"a row must be a JSON object, not {_kind(row)}")
    if isinstance(row, RepeatedKey) and row.key in USED_COLUMNS:
        raise MalformedRow(f"the key {row.key!r} stands twice in the row")
    if "messages" not in row:
        wrapped = [k for k, v in row.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        hint = f"; the rows seem to be the list under {wrapped[0]!r}: make that the file" if wrapped else ""
        raise MalformedRow(f"no 'messages' (found {', '.join(map(repr, row)) or 'nothing'}){hint}")
    messages, tools, kwargs = (row.get(column) for column in USED_COLUMNS)
    if not isinstance(messages, list) or not messages:
        raise MalformedRow(f"'messages' must be a list of messages, not {_kind(messages)}")
    if tools and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise MalformedRow("'tools' must be a list of JSON schemas")
    if kwargs and not isinstance(kwargs, dict):
        raise MalformedRow(f"'chat_template_kwargs' must be an object, not {_kind(kwargs)}")
    _refuse_odd_values([messages, tools, kwargs])
    checked = [_message(m, i) for i, m in enumerate(messages)]
    return Conversation(checked, tools or None, kwargs or None, path, line, text)


def _refuse_odd_values(value: Any) -> None:
    """Raises MalformedRow for a repeated key or a number that JSON doesn't have, anywhere inside `value`."""
    if isinstance(value, RepeatedKey):
        raise MalformedRow(f"the key {value.key!r} stands twice in one object")
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedRow("NaN and Infinity are not JSON")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_odd_values(item)


def _message(message: Any, index: int) -> dict[str, Any]:
    place = f"messages[{index}]"
    if not isinstance(message, dict):
        raise MalformedRow(f"{place} must be an object with role and content, not {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise MalformedRow(f"{place} has the role {role!r}; allowed are {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(_function(c).get("name"), str) for c in calls)
    ):
        raise MalformedRow(f"{place}: 'tool_calls' must be a list of calls, each with a function name")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise MalformedRow(f"{place}: 'reasoning_content' must be text, not {_kind(reasoning)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, place) for part in content)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        raise MalformedRow(f"{place}: 'content' must be text, not {_kind(content)}")
    return {**message, "content": content}


def _function(call: Any) -> dict:
    """The function of a tool call, written {"function": {"name": …}} or {"name": …}."""
    call = call if isinstance(call, dict) else {}
    return call["function"] if isinstance(call.get("function"), dict) else call


def _text_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise MalformedRow(f"{place}: only text parts are supported in 'content', not {str(part)[:60]!r}")


def _kind(value: Any) -> str:
    """What a JSON value is, in words for an error."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    if value in ([], {}, ""):
        return f"empty ({names[type(value)]})"
    return names.get(type(value), f"the number {value}")
