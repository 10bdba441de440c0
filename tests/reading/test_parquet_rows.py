"""Parquet of all types is read as it was written, and rows that expand are refused before they take memory."""

import datetime
import decimal
import random
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dft.reading import parquet_rows
from dft.reading.formats import read_file
from dft.reading.raw_rows import read_rows
from dft.reading.rows import Conversation
from tests.helpers import ROOT

VALUE = parquet_rows.VALUE_BYTES
NESTED = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.large_string())]))
COLUMNS = {  # type -> three values
    "text": (pyarrow.string(), ["a", None, "ü" * 9]),
    "large text": (pyarrow.large_string(), ["a", "b", None]),
    "bytes": (pyarrow.binary(), [b"\x00", None, b"abc"]),
    "fixed bytes": (pyarrow.binary(3), [b"abc", None, b"xyz"]),
    "a dictionary": (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", "b", "a"]),
    "numbers": (pyarrow.int32(), [1, None, 3]),
    "nothing": (pyarrow.null(), [None, None, None]),
    "a decimal": (pyarrow.decimal128(9, 2), [decimal.Decimal("1.50"), None, decimal.Decimal("2.00")]),
    "a time": (pyarrow.timestamp("us"), [datetime.datetime(2024, 1, 2), None, datetime.datetime(2025, 1, 2)]),
    "messages": (NESTED, [[{"role": "user", "content": "hi"}, None], None, []]),
    "lists of lists": (pyarrow.list_(pyarrow.list_(pyarrow.string())), [[["a"], []], [None], None]),
    "a large list": (pyarrow.large_list(pyarrow.string()), [["a", "b"], [], None]),
    "a fixed list": (pyarrow.list_(pyarrow.string(), 2), [["a", "b"], None, ["c", None]]),
    "a view of text": (pyarrow.string_view(), ["a", None, "a longer text than fits into a view"]),
    "a view of bytes": (pyarrow.binary_view(), [b"a", None, b"c"]),
    "a map": (pyarrow.map_(pyarrow.string(), pyarrow.string()), [[("a", "b")], None, []]),
}


def value_bytes(value: object) -> int:
    """What bytes_of says of a value, computed from the value itself."""
    if isinstance(value, dict):
        return VALUE + sum(map(value_bytes, value.values()))
    if isinstance(value, list):
        return VALUE + sum(map(value_bytes, value))
    return VALUE + (len(value.encode()) if isinstance(value, str) else 0)


def random_messages(choose: random.Random) -> list | None:
    if choose.random() < 0.2:
        return None
    texts = ["", "a", "ü" * 50, None]
    turns = [{"role": choose.choice(texts), "content": choose.choice(texts)} for _ in range(choose.randrange(4))]
    return [turn if turn["role"] is not None else {"role": "user", "content": None} for turn in turns]


@pytest.mark.parametrize("name", COLUMNS)
def test_values_of_every_type_are_read_as_they_were_written(tmp_path, name):
    kind, values = COLUMNS[name]
    table = pyarrow.table({"messages": pyarrow.array(values, kind), "id": [0, 1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(read_rows(str(tmp_path / "a.parquet")))
    assert [row.value for row in rows] == table.to_pylist()
    assert [row.line for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("kind", [pyarrow.list_view(pyarrow.int8()), pyarrow.large_list_view(pyarrow.string())])
def test_views_of_lists_are_refused_with_their_name(tmp_path, kind):
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array([[], None], kind)}), tmp_path / "a.parquet")
    (row,) = read_rows(str(tmp_path / "a.parquet"))
    assert row.reason == "unreadable_file"
    assert "list_view<" in row.detail
    assert "write it as a list" in row.detail


@pytest.mark.parametrize("kind", ["text", "time"])
def test_a_value_that_cannot_be_read_costs_its_row_alone(tmp_path, kind):
    rows = [[{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}] for i in range(50)]
    if kind == "text":
        broken = pyarrow.array([b"ok"] * 10 + [b"\xff"] + [b"ok"] * 39).view(pyarrow.string())
    else:
        broken = pyarrow.array([0] * 10 + [2**61] + [0] * 39).view(pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows, "other": broken}), tmp_path / "a.parquet")
    found = list(read_rows(str(tmp_path / "a.parquet")))
    assert [row.line for row in found if row.reason] == [11]
    assert {row.reason for row in found} == {None, "not_utf8" if kind == "text" else "unreadable_value"}
    assert [row.value["messages"] for row in found if not row.reason] == rows[:10] + rows[11:]


@pytest.mark.parametrize("start", [0, 7])
def test_the_size_of_each_row_is_that_of_its_values(start):
    """Also of an array that is a slice of another, and of one whose texts are in a dictionary."""
    choose = random.Random(0)
    values = [random_messages(choose) for _ in range(40)]
    kind = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    array = pyarrow.array(values, kind)
    roles = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    encoded = array.cast(pyarrow.list_(pyarrow.struct([("role", roles), ("content", roles)])))

    def expected(value: list | None) -> int:
        # the fields of a message are always there
        return VALUE + sum(value_bytes(message) for message in value or [])

    for one in (array, encoded):
        sizes = parquet_rows.bytes_of(one.slice(start))
        np.testing.assert_array_equal(sizes, [expected(value) for value in values[start:]])


@pytest.fixture(scope="module")
def shared_text(tmp_path_factory) -> str:
    """A file of some kilobytes with 300 rows, of which all but each tenth share a text of a quarter of a MiB."""
    texts = ["x" * (1 << 18) if i % 10 else "hi" for i in range(300)]
    answer = {"role": "assistant", "content": "yes"}
    rows = [[{"role": "user", "content": text}, answer] for text in texts]
    path = tmp_path_factory.mktemp("shared") / "shared.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": rows}), path, compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    assert path.stat().st_size < 20_000
    return str(path)


def mebibytes_of_reading(path: str, **limits: int) -> tuple[float, int]:
    """The most that Arrow holds while a file is read in a process of its own, and how many rows are refused."""
    changes = "".join(f"parquet_rows.{name} = {value}; " for name, value in limits.items())
    code = (
        f"import pyarrow; from dft.reading import parquet_rows; {changes}"
        f"refused = sum(row.reason == 'row_too_long' for row in parquet_rows.parquet_rows({path!r})); "
        "print(pyarrow.default_memory_pool().max_memory() / 2**20, refused)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    most, refused = done.stdout.split()
    return float(most), int(refused)


def test_rows_that_share_a_large_text_are_refused_before_they_are_copied(shared_text):
    most, refused = mebibytes_of_reading(shared_text, MAX_ROW_BYTES=1 << 17)
    assert refused == 270
    assert most < 20


def test_rows_that_may_be_large_are_copied_a_few_at_a_time(shared_text):
    """The mutant that copies all rows of a batch at once takes all of the 67 MiB."""
    few, _ = mebibytes_of_reading(shared_text, DECODED_BYTES=2 << 20)
    everything, refused = mebibytes_of_reading(shared_text, DECODED_BYTES=1 << 40)
    assert refused == 0
    assert few < 20
    assert everything > 67


def test_rows_between_those_that_are_refused_are_read(shared_text, monkeypatch):
    monkeypatch.setattr(parquet_rows, "MAX_ROW_BYTES", 1 << 17)
    rows = list(read_file(shared_text))
    refused = [row for row in rows if not isinstance(row, Conversation)]
    assert [row.line for row in refused] == [i + 1 for i in range(300) if i % 10]
    assert {row.reason for row in refused} == {"row_too_long"}
    assert [row.line for row in rows if isinstance(row, Conversation)] == [i + 1 for i in range(0, 300, 10)]


@pytest.mark.parametrize(("limit", "value"), [("MAX_VALUES", 100), ("MAX_UNPACKED", 1 << 16)])
def test_a_row_group_that_unpacks_to_very_much_ends_the_file(shared_text, monkeypatch, limit, value):
    monkeypatch.setattr(parquet_rows, limit, value)
    monkeypatch.setattr(parquet_rows, "MAX_RATIO", 10)
    (row,) = read_rows(shared_text)
    assert row.reason == "unreadable_file"
    assert "in a row group of" in row.detail
