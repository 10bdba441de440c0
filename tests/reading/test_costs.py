"""What hostile files cost: time and memory stay in proportion to their size."""

import gzip
import tracemalloc
from pathlib import Path

import pytest

from dft.reading.formats import read_file
from dft.reading.raw_rows import read_rows
from dft.reading.row_memory import MAX_EXPANSION, expands_too_much
from dft.reading.rows import Conversation
from dft.reading.strict_json import TOO_MANY_VALUES

ROW = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}], "more": [%s]}'
SIZE = 5 << 20
SMALL_VALUES = {
    "empty objects": "{},",
    "empty lists": "[],",
    "objects": '{"a":1},',
    "repeated keys": '{"a":1,"a":1},',
    "nested objects": '{"":{"":{}}},',
    "numbers": "1234,",
    "short strings": '"é1",',
}


def many(values: str) -> str:
    return ROW % ("a", (values * (SIZE // len(values)))[:-1])


def peak_of_reading(path: Path) -> tuple[list, int]:
    """The rows of a file, and the peak of the memory that Python allocates for them."""
    tracemalloc.start()
    try:
        rows = list(read_file(str(path), "messages"))
        return rows, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", SMALL_VALUES)
def test_rows_of_very_many_values_are_refused_before_they_are_parsed(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("dft.reading.strict_json.DECODER", None)
    path = tmp_path / "rows.jsonl"
    path.write_text(many(SMALL_VALUES[kind]) + "\n")
    assert [row.detail for row in read_file(str(path), "messages")] == [TOO_MANY_VALUES]


def test_an_item_of_very_many_values_is_refused_before_all_of_it_is_parsed(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{many('{},')}]")
    rows, peak = peak_of_reading(path)
    assert [row.detail for row in rows] == [f"{TOO_MANY_VALUES}; the rest is not read"]
    assert peak < MAX_EXPANSION * path.stat().st_size


@pytest.mark.parametrize(
    "text", ["a" * SIZE, "😀" + "a" * SIZE, "{a,b:[1,{2}]}" * (SIZE // 13), '\\"{},' * (SIZE // 5)]
)
def test_long_texts_are_read_whatever_they_hold(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW % (text, "1, 2") + "\n")
    rows, peak = peak_of_reading(path)
    assert isinstance(rows[0], Conversation)
    assert peak < MAX_EXPANSION * path.stat().st_size


def test_long_conversations_of_short_messages_are_read():
    question, answer = "How do I do this, if I have never done it?", "Like this, and then you can do it again."
    messages = f'{{"role": "user", "content": "{question}"}}, {{"role": "assistant", "content": "{answer}"}}, '
    assert not expands_too_much(messages * (2 * SIZE // len(messages)))


def test_small_rows_are_not_looked_at():
    assert not expands_too_much("{}" * 1000)


class Counted:
    """A stream that counts its calls."""

    def __init__(self, stream):
        self.stream, self.calls = stream, 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.stream, name)


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b" \t\n"])
@pytest.mark.parametrize("compressed", [False, True])
def test_blank_lines_are_skipped_by_the_buffer(line, compressed, tmp_path, monkeypatch):
    """Not one by one, which takes minutes for a few hundred megabytes; the lines after them keep their numbers."""
    from dft.reading import json_rows

    count = 300_000
    data = b"{}\n" + line * count + b'  {"a": 1}\n' + line * 3 + b'\xff\n  \n{"b": 2}'
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    with json_rows.open_stream(str(path)) as stream:
        counted = Counted(stream)
        list(json_rows._line_rows(counted))
        assert counted.calls < 3000
    rows = list(read_rows(str(path)))
    assert [(row.line, row.text) for row in rows] == [
        *((1, "{}"), (count + 2, '  {"a": 1}'), (count + 6, "\\xff"), (count + 8, '{"b": 2}')),
    ]
    assert f"byte {data.index(bytes([255]))} " in rows[2].detail
