"""Random and randomly damaged files are read: nothing is lost, changed or reordered in silence.

A normal run has 500 examples of each property, always the same. A long run has new ones each time:

    EXAMPLES=20000 python -m pytest tests/reading/test_reading_properties.py
"""

import itertools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from dft.config.data import ROLES
from dft.reading import parquet_rows, text_window
from dft.reading.raw_rows import read_rows
from dft.reading.rows import Conversation, RejectedRow
from tests.reading.test_reading import MARK, read, write

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
EXAMPLES = int(os.environ.get("EXAMPLES", 500))
thorough = settings(max_examples=EXAMPLES, derandomize="EXAMPLES" not in os.environ, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("properties")


# ---- random rows --------------------------------------------------------------------------------

ODD = '\0\x1f\x7f\t\n\r\\"/{}[],: \x85\u2028\u2029\ufeff\ufffd\U0010ffff1eé中😀'  # characters
TEXTS = ["\\u0041", "\\ud800", "\r\n", "null", "NaN", "[1]", '{"a": 1}', "},\n{", "2024-01-02T03:04:05Z", "1.50"]
characters = st.characters(exclude_categories=["Cs"])  # all of Unicode but surrogates
texts = st.text(ODD, max_size=8) | st.text(characters, max_size=12) | st.sampled_from(TEXTS)
names = st.sampled_from([*TEXTS, *ODD, "", "id", "a b"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
objects = st.dictionaries(names | texts, json_values, max_size=3)
extra_columns = st.dictionaries(names, json_values, max_size=3)
tool_calls = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": objects | texts})}),
    min_size=1,
    max_size=2,
)


def begins_with_nothing(chat: list[dict]) -> bool:
    """Whether the first message is an empty system message, which is left out."""
    return len(chat) > 1 and chat[0]["role"] in ("system", "developer") and not chat[0]["content"].strip()


messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": texts},
    optional={"tool_calls": tool_calls, "reasoning_content": texts, "name": texts},
)
conversations = st.fixed_dictionaries(
    {"messages": st.lists(messages, min_size=1, max_size=4).filter(lambda chat: not begins_with_nothing(chat))},
    optional={"tools": st.lists(objects, max_size=2), "chat_template_kwargs": objects},
)
rows = st.builds(lambda row, more: {**more, **row}, conversations, extra_columns)


@dataclass(frozen=True)
class Style:
    """One way to write rows to a file."""

    shape: str  # lines, array, indented objects or indented array
    ascii: bool
    separators: tuple[str, str]
    newline: str
    space: str  # white space before, after and between rows
    mark: bool
    last_newline: bool
    suffix: str

    def texts(self, values: list[dict]) -> list[bytes]:
        """The text of each row."""
        indent = 1 if "indented" in self.shape else None
        dumped = [json.dumps(r, ensure_ascii=self.ascii, separators=self.separators, indent=indent) for r in values]
        return [text.replace("\n", self.newline).encode() for text in dumped]

    def between(self) -> tuple[bytes, bytes, bytes]:
        """The bytes before, between and after the rows."""
        first, last = ("[", "]") if "array" in self.shape else ("", "")
        comma = "," if "array" in self.shape else ""
        newline, end = self.newline, self.newline if self.last_newline else ""
        parts = self.space + first + self.space, f"{comma}{newline}{self.space}", self.space + last + end
        before, between, after = (part.encode() for part in parts)
        return MARK * self.mark + before, between, after

    def content(self, values: list[dict]) -> bytes:
        before, between, after = self.between()
        return before + between.join(self.texts(values)) + after


CHOICES = (  # one list for each field of Style, in the same order
    ["lines", "array", "indented objects", "indented array"],
    [True, False],
    [(",", ":"), (", ", ": "), (" ,\t", " : ")],
    ["\n", "\r\n"],
    ["", "\n", " \r\n\t\n"],
    [False, True],
    [True, False],
    [".json", ".jsonl", ".json.gz", ".jsonl.zst"],
)
styles = st.sampled_from([Style(*choice) for choice in itertools.product(*CHOICES)])


def same(a, b) -> bool:
    """Whether values are equal, with the types of all numbers and the order of all keys."""
    return json.dumps(a) == json.dumps(b)


# ---- properties ---------------------------------------------------------------------------------


@thorough
@given(parts=st.lists(st.tuples(st.lists(rows, min_size=1, max_size=3), styles), min_size=1, max_size=3))
def test_rows_in_any_style_are_read_identical_in_order_and_with_their_lines(folder, parts):
    for i, (values, style) in enumerate(parts):
        path = write(folder / f"{i}{style.suffix}", style.content(values))
        found = read(path)
        assert [type(row) for row in found] == [Conversation] * len(values)
        for conversation, row, text in zip(found, values, style.texts(values), strict=True):
            assert same(conversation.messages, row["messages"])
            assert same(conversation.tools, row.get("tools") or None)
            assert same(conversation.template_kwargs, row.get("chat_template_kwargs") or None)
            assert conversation.row.strip() == text.decode().strip()
            assert same(json.loads(conversation.row), row)
        assert [row.line for row in found] == lines_of_rows(style, values)


def lines_of_rows(style: Style, values: list[dict]) -> list[int]:
    """The line that each row starts on."""
    return [style.content(values)[:start].count(b"\n") + 1 for start in starts_of_rows(style, values)]


def starts_of_rows(style: Style, values: list[dict]) -> list[int]:
    """The byte that each row starts at."""
    before, between, _ = style.between()
    starts, position = [], len(before)
    for text in style.texts(values):
        starts.append(position)
        position += len(text) + len(between)
    return starts


TOKENS = [bytes([byte]) for byte in b'"\\{}[],:\n \x0b'] + [b"null", b"NaN", b"1e", b"\\ud800", MARK]
edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "delete", "insert", "truncate"]),
        st.floats(0, 1, exclude_max=True),  # where, as a part of the length
        st.sampled_from(TOKENS) | st.binary(min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def damage(content: bytes, changes: list[tuple[str, float, bytes]]) -> tuple[bytes, int]:
    """The content after all changes, and the first place that was changed."""
    first = len(content)
    for what, where, data in changes:
        at = int(where * len(content))
        first = min(first, at)
        if what == "insert":
            content = content[:at] + data + content[at:]
        elif what == "delete":
            content = content[:at] + content[at + len(data) :]
        elif what == "truncate":
            content = content[:at]
        else:
            content = content[:at] + bytes(byte ^ data[0] for byte in content[at : at + 1]) + content[at + 1 :]
    return content, first


def strict(pairs: list[tuple]) -> dict:
    """An object for json.loads; fails if a column that is used stands in it twice."""
    keys = [key for key, _ in pairs]
    assert not any(keys.count(key) > 1 for key in ("messages", "role", "content", "tools"))
    return dict(pairs)


plain_messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
plain_rows = st.builds(
    lambda turns, name: {"messages": turns, "id": name}, st.lists(plain_messages, min_size=1, max_size=3), texts
)


@thorough
@given(values=st.lists(plain_rows, min_size=1, max_size=5), style=styles, changes=edits)
def test_damage_is_named_and_changes_no_other_row(folder, values, style, changes):
    content, first_touched = damage(style.content(values), changes)
    path = folder / "damaged.json"
    path.write_bytes(content)
    found = read(path)
    assert found
    lines = content.split(b"\n")
    for row in found:
        assert row.path == str(path)
        assert 1 <= row.line <= len(lines) + 1
        if isinstance(row, RejectedRow):
            assert row.reason
            assert str(row) == f"{path}:{row.line}: {row.detail}"
            continue
        assert row.row.encode() in b"\n".join(lines[row.line - 1 :])
        alone = json.loads(row.row, object_pairs_hook=strict)
        assert same(row.messages, alone["messages"])
        assert {message["role"] for message in row.messages} <= set(ROLES)
        assert all(isinstance(message["content"], str) for message in row.messages)
    untouched = [i for i, start in enumerate(starts_of_rows(style, values)[1:]) if start <= first_touched]
    assert all(isinstance(row, Conversation) for row in found[: len(untouched)])
    assert [row.messages for row in found[: len(untouched)]] == [values[i]["messages"] for i in untouched]
    if style.shape == "lines" and untouched:
        good = style.texts(values)
        standing = [text.removeprefix(MARK * (i == 0)).strip(b" \t\r\n") for i, text in enumerate(lines)]
        kept = [row.row.strip(" \t\r\n").encode() for row in found if isinstance(row, Conversation)]
        assert [text for text in kept if text in good] == [text for text in standing if text in good]


@thorough
@given(values=st.lists(plain_rows, min_size=1, max_size=4), style=styles, changes=edits)
def test_damage_to_a_compressed_file_raises_nothing(folder, values, style, changes):
    whole = style.content(values)
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        path = write(folder / f"packed{suffix}", whole)
        path.write_bytes(damage(path.read_bytes(), changes)[0])
        for row in read(path):
            assert isinstance(row, RejectedRow) or same(row.messages, json.loads(row.row)["messages"])


@thorough
@given(values=st.lists(plain_rows, min_size=1, max_size=5), batch=st.integers(1, 3))
def test_parquet_rows_are_read_in_batches_of_any_size(folder, values, batch):
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=2)
    with mock.patch.object(parquet_rows, "ROWS_AT_ONCE", batch):
        found = read(path)
    assert [(row.line, row.messages) for row in found] == [(i, row["messages"]) for i, row in enumerate(values, 1)]


@thorough
@given(
    values=st.lists(rows, min_size=1, max_size=3), style=styles, changes=st.just([]) | edits, chunk=st.integers(1, 64)
)
def test_rows_and_errors_do_not_depend_on_the_size_of_the_window(folder, values, style, changes, chunk):
    path = folder / "window.json"
    path.write_bytes(damage(style.content(values), changes)[0])
    in_one = list(read_rows(str(path)))
    with mock.patch.object(text_window, "CHUNK_BYTES", chunk):
        in_pieces = list(read_rows(str(path)))
    assert [(r.line, r.reason, r.detail) for r in in_pieces] == [(r.line, r.reason, r.detail) for r in in_one]
    assert [r.text for r in in_pieces if r.reason is None] == [r.text for r in in_one if r.reason is None]
