"""Data files are found and read: every way to write the same rows, and every format, gives the same conversations."""

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dft.errors import UserError
from dft.reading.discovery import DataFile, find_data_files
from dft.reading.formats import detect_format, read_file
from dft.reading.raw_rows import read_rows
from dft.reading.rows import Conversation, RejectedRow
from tests.helpers import write_jsonl


def chat(question: str = "Q", answer: str = "A", **columns) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


def line(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # else the bytes would change with the time of the test


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write(path: Path, content: bytes) -> Path:
    """Writes a file, compressed if its suffix says so."""
    compress = {".gz": gzipped, ".zst": zstandard}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


def read(path: Path, *args) -> list[Conversation | RejectedRow]:
    return list(read_file(str(path), *args))


def read_one(tmp_path, row, *args) -> Conversation:
    """Writes one row to a file and reads its conversation."""
    (conversation,) = read(write_jsonl(tmp_path / "one.jsonl", [row]), *args)
    assert isinstance(conversation, Conversation), conversation.detail
    return conversation


def questions(rows: list) -> list[str]:
    return [row.messages[0]["content"] for row in rows if isinstance(row, Conversation)]


# ---- ways to write the same rows ----------------------------------------------------------------

ROW, OTHER, MARK = line(chat("one")), line(chat("two")), b"\xef\xbb\xbf"
INDENTED = [json.dumps(chat(text), indent=2).encode() for text in ("one", "two")]  # each has 12 lines
ACCEPTED = {  # name: the content of a file, and the lines that its two rows start on
    "lines": (ROW + b"\n" + OTHER + b"\n", [1, 2]),
    "no final newline": (ROW + b"\n" + OTHER, [1, 2]),
    "windows line ends": (ROW + b"\r\n" + OTHER + b"\r\n", [1, 2]),
    "blank lines": (b"\n" + ROW + b"\n\n \t \r\n" + OTHER + b"\n\n", [2, 5]),
    "space around rows": (b"  " + ROW + b" \t\n\t" + OTHER + b"  ", [1, 2]),
    "byte-order mark": (MARK + ROW + b"\n" + OTHER, [1, 2]),
    "mark and blank line": (MARK + b"\r\n" + ROW + b"\n" + OTHER, [2, 3]),
    "array": (b"[" + ROW + b", " + OTHER + b"]", [1, 1]),
    "array of lines": (b"[\n" + ROW + b",\n" + OTHER + b"\n]\n", [2, 3]),
    "commas first": (b"[\n" + ROW + b"\n,\n" + OTHER + b"\n]\n", [2, 4]),
    "array with mark": (MARK + b" \n[\r\n" + ROW + b"\r\n,\r\n" + OTHER + b"\r\n]\r\n\r\n", [3, 5]),
    "indented array": (json.dumps([chat("one"), chat("two")], indent=2).encode(), [2, 14]),
    "indented with tabs": (json.dumps([chat("one"), chat("two")], indent="\t").encode(), [2, 14]),
    "indented objects": (b"\n".join(INDENTED), [1, 13]),
    "indented objects, mark, windows": (MARK + b"\n\n".join(INDENTED).replace(b"\n", b"\r\n"), [1, 14]),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.zst"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_every_way_to_write_rows_gives_the_same_conversations(tmp_path, name, suffix):
    content, lines = ACCEPTED[name]
    rows = read(write(tmp_path / f"data{suffix}", content))
    assert [row.messages for row in rows] == [chat("one")["messages"], chat("two")["messages"]]
    assert [row.line for row in rows] == lines
    assert [json.loads(row.row) for row in rows] == [chat("one"), chat("two")]


def test_parquet_rows_are_read_without_the_nulls_of_their_common_schema(tmp_path):
    """The file has more rows than are read at once."""
    call = {"function": {"name": "f", "arguments": "{}"}}
    rows = [chat(str(i), id=i) for i in range(600)]
    rows[7]["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    conversations = read(tmp_path / "a.parquet")
    assert [c.line for c in conversations] == list(range(1, 601))
    rows[7]["messages"][1]["content"] = ""
    assert [c.messages for c in conversations] == [row["messages"] for row in rows]
    assert json.loads(conversations[599].row) == rows[599]


def test_compressed_files_of_several_parts_are_read_whole(tmp_path):
    """`cat a.gz b.gz` and parallel compressors write such files."""
    for name, compress in (("a.jsonl.gz", gzipped), ("a.jsonl.zst", zstandard)):
        (tmp_path / name).write_bytes(compress(ROW[:20]) + compress(ROW[20:] + b"\n") + compress(OTHER))
        assert questions(read(tmp_path / name)) == ["one", "two"]


def test_text_is_kept_word_for_word(tmp_path):
    """Dates, numbers in text, NUL, U+2028 and JSON look-alikes survive; other columns may clash."""
    texts = [
        "2024-01-02T03:04:05Z",
        "1.50",
        "a\u2028b\x85c",
        "nul\x00",
        '{"a": 1}',
        "null",
        "  x \n",
        "\U0001f600",
        "",
    ]
    rows = [chat(t, t, id=i if i % 2 else str(i), meta=[{"x": 1}, None, 3.5][i % 3]) for i, t in enumerate(texts)]
    rows.append(chat("x", "y", meta={"x": {"y": []}}))
    conversations = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [c.messages for c in conversations] == [row["messages"] for row in rows]


def test_one_odd_row_at_the_end_changes_no_other(tmp_path):
    """Readers that infer a schema rewrite thousands of texts here, or refuse the file."""
    rows = [chat(f"question {i}", f'["{i}"]', id=i, date="2024-01-02T03:04:05Z") for i in range(30_000)]
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    odd = [chat(parts, "odd"), {**chat("clash"), "id": {"not": "a number"}, "date": [1]}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line(row) for row in rows + odd))
    conversations = read(path)
    assert [c.messages for c in conversations[:30_000]] == [row["messages"] for row in rows]
    assert questions(conversations[30_000:]) == ["two parts", "clash"]


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    row = ROW[:-1] + b', "score": NaN, "meta": {"a": 1, "a": 2}, "id": 1, "id": 2, "instruction": 3}'
    (conversation,) = read(write(tmp_path / "a.jsonl", row))
    assert conversation.messages == chat("one")["messages"]
    assert conversation.row == row.decode()


# ---- the formats --------------------------------------------------------------------------------

USER, ANSWER = chat()["messages"]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def test_messages_tools_and_template_arguments_pass_through(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"deep": [{"x": None}]}}}
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "1", "tool_call_id": "1", "name": None},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ]
    read_row = read_one(tmp_path, {"messages": messages, "tools": [TOOL], "chat_template_kwargs": {"think": False}})
    assert read_row.messages == [
        messages[0],
        {**messages[1], "content": "ab"},
        {**messages[2], "content": ""},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "done"},
    ]
    assert (read_row.tools, read_row.template_kwargs) == ([TOOL], {"think": False})


def test_weight_and_train_become_one_weight(tmp_path):
    given = [{}, {"weight": 0}, {"weight": 2}, {"train": False}, {"train": True}, {"train": True, "weight": 0.5}]
    row = {"messages": [{**ANSWER, **marks} for marks in given]}
    weights = [message.get("weight") for message in read_one(tmp_path, row).messages]
    assert weights == [None, 0.0, 2.0, 0.0, 1.0, 0.5]
    assert all(isinstance(weight, float) for weight in weights[1:])


def test_sharegpt_becomes_messages_with_tool_calls(tmp_path):
    turns = [
        ("human", "Q"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "1"),
        ("gpt", "A"),
    ]
    row = {
        "conversations": [{"from": name, "value": value} for name, value in turns],
        "system": "Be short.",
        "tools": json.dumps([TOOL]),
    }
    conversation = read_one(tmp_path, row)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert conversation.messages == [
        {"role": "system", "content": "Be short."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    assert conversation.tools == [TOOL]


def test_sharegpt_may_have_messages_several_calls_and_any_usual_name(tmp_path):
    two_calls = {"from": "function_call", "value": [{"name": "f"}, {"name": "g"}]}
    trained = {"from": "gpt", "value": "A", "train": False}
    row = {"conversations": [USER, two_calls, trained], "system": "", "tools": ""}
    question, calling, answer = read_one(tmp_path, row).messages
    assert question == USER
    assert [call["function"] for call in calling["tool_calls"]] == [{"name": "f"}, {"name": "g"}]
    assert answer == {**ANSWER, "train": False, "weight": 0.0}
    for name in ("human", "user"):
        assert read_one(tmp_path, {"conversations": [{"from": name, "value": "Q"}]}).messages == [USER]
    for name in ("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard"):
        assert read_one(tmp_path, {"conversations": [{"from": name, "value": "A"}]}).messages == [ANSWER]


def test_alpaca_becomes_messages(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["Hi", "Hello"]]}
    pairs = [("system", "S"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 2"), ("assistant", "3")]
    assert read_one(tmp_path, row).messages == [{"role": role, "content": text} for role, text in pairs]
    for extra in ({}, {"input": ""}, {"input": None, "system": None, "history": None}, {"system": "", "history": []}):
        assert read_one(tmp_path, {"instruction": "Q", "output": "A", **extra}).messages == [USER, ANSWER]
    assert read_one(tmp_path, {"instruction": "", "input": "Q", "output": "A"}).messages == [USER, ANSWER]


def test_assistant_turns_of_a_prompt_get_the_weight_0(tmp_path):
    assert read_one(tmp_path, {"prompt": "Q", "completion": "A"}).messages == [USER, ANSWER]
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER], "tools": [TOOL]}
    conversation = read_one(tmp_path, row)
    assert conversation.messages == [USER, {**ANSWER, "weight": 0.0}, USER, ANSWER, USER, ANSWER]
    assert conversation.tools == [TOOL]


def test_the_format_is_detected_from_the_first_rows(tmp_path):
    rows = {
        "messages": chat(),
        "sharegpt": {"conversations": [USER]},
        "alpaca": {"instruction": "Q", "output": "A"},
        "prompt_completion": {"prompt": "Q", "completion": "A"},
    }
    for name, row in rows.items():
        path = write(tmp_path / "a.jsonl", b"{broken\n3\nnull\n" + line({"text": "x"}) + b"\n" + line(row))
        assert detect_format(str(path)) == name
        assert isinstance(read(path)[-1], Conversation)
    assert detect_format(str(write(tmp_path / "a.jsonl", b'{"text": "x"}'))) == "messages"
    assert detect_format(str(write(tmp_path / "a.jsonl", b"\xff"))) == "messages"


def test_the_format_and_roles_can_be_given(tmp_path):
    row = {**chat("messages"), "instruction": "alpaca", "output": "A", "prompt": "prompt", "completion": "A"}
    for name in ("messages", "alpaca"):
        assert read_one(tmp_path, row, name).messages[0]["content"] == name
    assert read_one(tmp_path, row, "prompt_completion").messages[0]["content"] == "prompt"
    mapped = {"messages": [{"role": "Human", "content": "Q"}, {"role": "AI", "content": "A"}]}
    assert read_one(tmp_path, mapped, "auto", {"Human": "user", "AI": "assistant"}).messages == [USER, ANSWER]
    swapped = {"conversations": [{"from": "gpt", "value": "Q"}, {"from": "function_call", "value": "A"}]}
    roles = {"gpt": "user", "function_call": "assistant"}
    assert read_one(tmp_path, swapped, "sharegpt", roles).messages == [USER, ANSWER]


# ---- finding files ------------------------------------------------------------------------------


def test_directories_and_globs_name_each_data_file_once(tmp_path):
    names = ["a.json", "b.jsonl", "c.jsonl.gz", "d.json.zst", "deep/e.parquet"]
    for name in (*names, "x.txt", "y.csv.gz", "z.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ROW)
    files = [DataFile(str(tmp_path / name)) for name in names]
    assert find_data_files([str(tmp_path)], "data_files") == files
    assert find_data_files([str(tmp_path / "[ab].json*")], "data_files") == files[:2]
    assert find_data_files([str(tmp_path / "**" / "*.parquet")], "data_files") == [files[4]]
    same_file = str(tmp_path / "deep" / ".." / "b.jsonl")
    assert find_data_files([files[1].path, same_file, files[0].path], "data_files") == [files[1], files[0]]


def test_patterns_give_samples_and_weights(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "odd#7"):
        (tmp_path / name).mkdir() if name == "odd#7" else (tmp_path / name).write_bytes(ROW)
    (tmp_path / "odd#7" / "c#12.jsonl").write_bytes(ROW)
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "odd#7/c#12.jsonl"))
    found = find_data_files([f"{a}#1000", f"{tmp_path}/b*#5", c], "data_files", [0.5, 2.0, 1.0])
    assert found == [DataFile(a, 1000, 0.5), DataFile(b, 5, 2.0), DataFile(c)]
    assert find_data_files([f"{tmp_path}/odd#7"], "data_files") == [DataFile(c)]
    assert find_data_files([f"{c}#3"], "data_files") == [DataFile(c, 3)]
    with pytest.raises(UserError, match="--data_weights has 1 values for 2 --data_files"):
        find_data_files([a, b], "data_files", [1.0])


def test_missing_files_are_all_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    names = ["no1.jsonl", "no2.jsonl#5", "notes.txt", "empty", "*.nothing"]
    with pytest.raises(UserError) as caught:
        find_data_files([str(tmp_path / name) for name in names], "eval_data_files")
    for words in (
        "no1.jsonl: no such",
        "no2.jsonl#5: no such",
        "notes.txt: not a .json, .jsonl, .parquet file (docs/data.md: how to convert a table)",
        "empty: no data",
        "*.nothing: no such",
    ):
        assert words in str(caught.value)
    assert "--eval_data_files" in str(caught.value)


def test_a_file_that_cannot_be_opened_is_a_user_error(tmp_path):
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} can't be read"):
            list(read_rows(str(path)))
