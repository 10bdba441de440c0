"""Reading random and randomly damaged files: nothing is lost, changed or reordered in silence.

The normal run has 500 examples of each property, always the same. A long one has others each time:

    EXAMPLES=20000 python -m pytest tests/test_reading_properties.py
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

from dft.reading import files as data_files
from dft.reading.files import read_rows
from dft.reading.formats import ROLES, Conversation, RejectedRow
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
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
objects = st.dictionaries(names | texts, values, max_size=3)
extra_columns = st.dictionaries(names, values, max_size=3)
tool_calls = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": objects | texts})}),
    max_size=2,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": texts},
    optional={"tool_calls": tool_calls, "reasoning_content": texts, "name": texts},
)
conversations = st.fixed_dictionaries(
    {"messages": st.lists(messages, min_size=1, max_size=4)},
    optional={"tools": st.lists(objects, max_size=2), "chat_template_kwargs": objects},
)
rows = st.builds(lambda row, more: {**more, **row}, conversations, extra_columns)


@dataclass(frozen=True)
class Style:
    """One way to write rows to a file."""

    shape: str  # lines, array, or the same indented
    ascii: bool
    separators: tuple[str, str]
    newline: str
    blank: str  # before, after and between rows
    mark: bool
    last_newline: bool
    suffix: str

    def rows(self, some: list[dict]) -> list[bytes]:
        """The text of each row."""
        indent = 1 if "indented" in self.shape else None
        dumped = [json.dumps(r, ensure_ascii=self.ascii, separators=self.separators, indent=indent) for r in some]
        return [text.replace("\n", self.newline).encode() for text in dumped]

    def between(self) -> tuple[bytes, bytes, bytes]:
        """What stands before, between and after the rows."""
        first, last = ("[", "]") if "array" in self.shape else ("", "")
        comma = "," if "array" in self.shape else ""
        newline, end = self.newline, self.newline if self.last_newline else ""
        parts = self.blank + first + self.blank, f"{comma}{newline}{self.blank}", self.blank + last + end
        before, between, after = (part.encode() for part in parts)
        return MARK * self.mark + before, between, after

    def content(self, some: list[dict]) -> bytes:
        before, between, after = self.between()
        return before + between.join(self.rows(some)) + after


CHOICES = (  # in the order of Style's fields
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
    """Equal with the types of all numbers and the order of all keys."""
    return json.dumps(a) == json.dumps(b)


# ---- properties ---------------------------------------------------------------------------------


@thorough
@given(parts=st.lists(st.tuples(st.lists(rows, min_size=1, max_size=3), styles), min_size=1, max_size=3))
def test_what_is_written_is_read(folder, parts):
    """Rows in any of the styles, split over several files, come back identical, in order, with their lines."""
    for i, (some, style) in enumerate(parts):
        path = write(folder / f"{i}{style.suffix}", style.content(some))
        found = read(path)
        assert [type(row) for row in found] == [Conversation] * len(some)
        for conversation, row, text in zip(found, some, style.rows(some), strict=True):
            assert same(conversation.messages, row["messages"])
            assert same(conversation.tools, row.get("tools") or None)
            assert same(conversation.template_kwargs, row.get("chat_template_kwargs") or None)
            assert conversation.row.strip() == text.decode().strip()
            assert same(json.loads(conversation.row), row)
        assert [row.line for row in found] == lines_of_rows(style, some)


def lines_of_rows(style: Style, some: list[dict]) -> list[int]:
    """The line that each row starts on."""
    return [style.content(some)[:start].count(b"\n") + 1 for start in starts_of_rows(style, some)]


def starts_of_rows(style: Style, some: list[dict]) -> list[int]:
    before, between, _ = style.between()
    starts, position = [], len(before)
    for text in style.rows(some):
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
    """The content after some changes, and the first place that was touched."""
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
    """Refuses the repeated keys of the columns that are used."""
    keys = [key for key, _ in pairs]
    assert not any(keys.count(key) > 1 for key in ("messages", "role", "content", "tools"))
    return dict(pairs)


plain_messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
plain_rows = st.builds(
    lambda turns, name: {"messages": turns, "id": name}, st.lists(plain_messages, min_size=1, max_size=3), texts
)


@thorough
@given(some=st.lists(plain_rows, min_size=1, max_size=5), style=styles, changes=edits)
def test_damage_is_said_and_changes_no_other_row(folder, some, style, changes):
    content, first_touched = damage(style.content(some), changes)
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
    untouched = [i for i, start in enumerate(starts_of_rows(style, some)[1:]) if start <= first_touched]
    assert all(isinstance(row, Conversation) for row in found[: len(untouched)])
    assert [row.messages for row in found[: len(untouched)]] == [some[i]["messages"] for i in untouched]
    if style.shape == "lines" and untouched:
        good = style.rows(some)
        standing = [text.removeprefix(MARK * (i == 0)).strip(b" \t\r\n") for i, text in enumerate(lines)]
        kept = [row.row.strip(" \t\r\n").encode() for row in found if isinstance(row, Conversation)]
        assert [text for text in kept if text in good] == [text for text in standing if text in good]


@thorough
@given(some=st.lists(plain_rows, min_size=1, max_size=4), style=styles, changes=edits)
def test_damage_to_a_compressed_file_raises_nothing(folder, some, style, changes):
    whole = style.content(some)
    for suffix in (".jsonl.gz", ".jsonl.zst"):
        path = write(folder / f"packed{suffix}", whole)
        path.write_bytes(damage(path.read_bytes(), changes)[0])
        for row in read(path):
            assert isinstance(row, RejectedRow) or same(row.messages, json.loads(row.row)["messages"])


@thorough
@given(some=st.lists(plain_rows, min_size=1, max_size=5), batch=st.integers(1, 3))
def test_parquet_is_read(folder, some, batch):
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path, row_group_size=2)
    with mock.patch.object(data_files, "PARQUET_ROWS", batch):
        found = read(path)
    assert [(row.line, row.messages) for row in found] == [(i, row["messages"]) for i, row in enumerate(some, 1)]


@thorough
@given(
    some=st.lists(rows, min_size=1, max_size=3), style=styles, changes=st.just([]) | edits, chunk=st.integers(1, 64)
)
def test_windows_of_any_size_give_the_same(folder, some, style, changes, chunk):
    """Rows, lines and errors don't depend on where the reads of a file end."""
    path = folder / "window.json"
    path.write_bytes(damage(style.content(some), changes)[0])
    in_one = list(read_rows(str(path)))
    with mock.patch.object(data_files, "CHUNK", chunk):
        in_pieces = list(read_rows(str(path)))
    assert [(r.line, r.reason, r.detail) for r in in_pieces] == [(r.line, r.reason, r.detail) for r in in_one]
    assert [r.text for r in in_pieces if r.reason is None] == [r.text for r in in_one if r.reason is None]
