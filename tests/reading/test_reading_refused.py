"""Broken and malformed data is named with its file and line, and the good rows around it are kept."""

import hashlib
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from dft.reading import json_rows, text_window
from dft.reading.rows import Conversation, RejectedRow
from tests.reading.test_reading import (
    INDENTED,
    MARK,
    OTHER,
    ROW,
    chat,
    gzipped,
    line,
    questions,
    read,
    write,
    zstandard,
)


def row(*messages, **columns) -> bytes:
    return line({"messages": list(messages), **columns})


def user(content="x", **more) -> dict:
    return {"role": "user", "content": content, **more}


def calls(*tool_calls) -> bytes:
    return row({"role": "assistant", "content": "", "tool_calls": list(tool_calls)})


def refused(rows: list) -> RejectedRow:
    """The only rejected row."""
    (rejected,) = [r for r in rows if isinstance(r, RejectedRow)]
    assert rejected.is_malformed
    assert str(rejected) == f"{rejected.path}:{rejected.line}: {rejected.detail}"
    return rejected


# ---- one bad row among good ones ----------------------------------------------------------------

BROKEN = {  # name: a row that is not JSON, and words of its error; in an array the rows after it are lost
    "cut off": (ROW[:45], "broken JSON: Unterminated string"),
    "cut off after a bracket": (b'{"messages": [', "broken JSON: Expecting value"),
    "not closed": (ROW[:-1], "broken JSON: Expecting ',' delimiter"),
    "trailing comma in an object": (ROW[:-1] + b",}", "property name"),
    "trailing comma in a list": (b'{"messages": [{"role": "user"},]}', "Expecting value"),
    "single quotes": (ROW.replace(b'"', b"'"), "property name"),
    "no quotes": (b"{messages: []}", "property name"),
    "python": (b'{"messages": None}', "Expecting value"),
    "comment": (b"// a comment", "Expecting value"),
    "raw tab in a text": (row(user("x\ty")).replace(rb"\t", b"\t"), "Invalid control character"),
    "raw NUL in a text": (row(user("x\0y")).replace(rb"\u0000", b"\0"), "Invalid control character"),
    "bad escape": (rb'{"messages": "\x41"}', "Invalid \\escape"),
    "bad unicode escape": (rb'{"messages": "\u12g4"}', "Invalid \\uXXXX escape"),
    "leading zero": (b'{"x": 01}', "Expecting ',' delimiter"),
    "two objects on one line": (ROW + b" " + OTHER, "broken JSON: Extra data at column 91"),
    "two objects that touch": (ROW + OTHER, "Extra data"),
    "comma after the row": (ROW + b",", "Extra data"),
    "line separator after the row": (ROW + "\u2028".encode(), "Extra data"),
    "byte-order mark in the middle": (MARK + ROW, "Expecting value"),
    "latin-1": (line(chat("é")).decode().encode("latin-1"), "not UTF-8 at byte 133 (invalid continuation byte)"),
    "overlong": (ROW[:-3] + b'\xc0\x80"}]}', "not UTF-8 at byte 176 (invalid start byte)"),
    "surrogate in the bytes": (ROW[:-3] + b'\xed\xa0\x80"}]}', "not UTF-8 at byte 176 (invalid continuation byte)"),
}
SURROGATES = "half of a surrogate pair"
MALFORMED = {  # name: JSON that is no valid row, and words of its error
    "number": (b"3", "must be a JSON object, not the number 3"),
    "float": (b"1.5e3", "not the number 1500.0"),
    "null": (b"null", "not null"),
    "true": (b"true", "not true or false"),
    "text": (b'"hello"', "not text"),
    "list": (b"[" + ROW + b"]", "must be a JSON object, not a list"),
    "empty object": (b"{}", "no 'messages' (found nothing)"),
    "no messages": (b'{"text": "x", "id": 1}', "no 'messages' (found 'text', 'id')"),
    "wrapper": (b'{"data": [' + ROW + b"]}", "rows seem to be the list under 'data'"),
    "messages under another name": (
        line({"message": [user()]}),
        "list under 'message' seems to be the conversation: call it 'messages'",
    ),
    "sharegpt under another name": (b'{"chat": [{"from": "human", "value": "x"}]}', "call it 'conversations'"),
    "row of another format": (b'{"conversations": [{"from": "human", "value": "x"}]}', "need a file of their own"),
    "one message": (line(user()), "this is one message, and a row is a whole conversation"),
    "pair": (b'{"question": "x", "answer": "y"}', "become a chat by scripts/prepare_pairs.py"),
    "preference data": (b'{"prompt": "x", "chosen": "y", "rejected": "z"}', "this is preference data"),
    "messages null": (b'{"messages": null}', "'messages' must be a list of messages, not null"),
    "messages a string": (b'{"messages": "x"}', "'messages' must be a list of messages, not text"),
    "messages an object": (line({"messages": user()}), "'messages' must be a list of messages, not an object"),
    "messages empty": (b'{"messages": []}', "not empty (a list)"),
    "message a string": (row(user(), "x"), "messages[1] must be an object with role and content, not text"),
    "message null": (row(None), "messages[0] must be an object with role and content, not null"),
    "role human": (row({"role": "human", "content": "x"}), "messages[0] has the role 'human'; allowed are system, "),
    "role User": (row({"role": "User", "content": "x"}), "role 'User'; allowed are"),
    "role with a space": (row({"role": "user ", "content": "x"}), "role 'user '"),
    "no role": (row({"content": "x"}), "role None"),
    "role a number": (row({"role": 1, "content": "x"}), "role 1;"),
    "role a list": (row({"role": ["user"], "content": "x"}), "role ['user']"),
    "content missing": (row({"role": "user"}), "'content' must be text, not null"),
    "content null": (row(user(None)), "'content' must be text, not null"),
    "content null without calls": (row({"role": "assistant", "content": None, "tool_calls": []}), "not null"),
    "content a number": (row(user(3)), "'content' must be text, not the number 3"),
    "content true": (row(user(True)), "'content' must be text, not true or false"),
    "content an object": (row(user({"text": "x"})), "'content' must be text, not an object"),
    "image part": (row(user([{"type": "image"}])), "only text parts are supported"),
    "part a string": (row(user(["x"])), "only text parts are supported"),
    "part without text": (row(user([{"type": "text"}])), "only text parts are supported"),
    "text of a part a number": (row(user([{"type": "text", "text": 1}])), "only text parts are supported"),
    "tools a string": (line(chat(tools="f")), "'tools' is a text that isn't JSON"),
    "tools an object": (line(chat(tools={"name": "f"})), "'tools' must be a list"),
    "tools an empty object": (line(chat(tools={})), "'tools' must be a list"),
    "tools of strings": (line(chat(tools=["f"])), "'tools' must be a list"),
    "tools an object in a text": (line(chat(tools='{"name": "f"}')), "'tools' must be a list"),
    "tool call a string": (calls("f"), "'tool_calls' must be a list of calls, each with a function name"),
    "tool call without a name": (calls({"function": {"arguments": "{}"}}), "each with a function name"),
    "tool call with a number for a name": (calls({"function": {"name": 1}}), "each with a function name"),
    "tool calls an object": (row({"role": "assistant", "content": "", "tool_calls": {"name": "f"}}), "'tool_calls'"),
    "reasoning a list": (row({"role": "assistant", "content": "", "reasoning_content": ["x"]}), "'reasoning_content'"),
    "weight negative": (row(user(weight=-1)), "'weight' must be a number of at least 0, not the number -1"),
    "weight text": (row(user(weight="1")), "'weight' must be a number of at least 0, not text"),
    "weight true": (row(user(weight=True)), "'weight' must be a number of at least 0, not true or false"),
    "weight beyond floats": (
        row(user(weight=10**400)),
        "'weight' must be a number of at least 0, not the number 1000",
    ),
    "train text": (row(user(train="no")), "'train' must be true or false, not text"),
    "train a number": (row(user(train=0)), "'train' must be true or false, not the number 0"),
    "template arguments a list": (line(chat(chat_template_kwargs=[1])), "'chat_template_kwargs' must be an object"),
    "key twice in the row": (b'{"messages": [], ' + ROW[1:], "the key 'messages' stands twice in the row"),
    "two keys twice": (b'{"id": 1, "id": 1, "messages": [], ' + ROW[1:], "'messages' stands twice"),
    "key twice in a message": (
        b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}',
        "'role' stands twice",
    ),
    "key twice in a tool": (ROW[:-1] + b', "tools": [{"x": {"a": 1, "b": 2, "a": 1}}]}', "'a' stands twice"),
    "key twice in tools text": (line(chat(tools='[{"a": 1, "a": 2}]')), "'a' stands twice"),
    "nan": (row(user(weight=float("nan"))), "NaN and Infinity are not JSON"),
    "infinity": (row(user(), tools=[{"x": -float("inf")}]), "NaN and Infinity are not JSON"),
    "beyond floats": (b'{"messages": [{"role": "user", "content": "x", "weight": 1e999}]}', "NaN and Infinity"),
    "nan in tools text": (line(chat(tools='[{"a": NaN}]')), "NaN and Infinity are not JSON"),
    "surrogate": (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', SURROGATES),
    "surrogates in the wrong order": (rb'{"messages": [{"role": "user", "content": "\uDC00\uD83D"}]}', SURROGATES),
    "surrogate in a key": (rb'{"messages": [{"role": "user", "content": "x", "\udfff": 1}]}', SURROGATES),
    "surrogate in tools text": (line(chat(tools=r'[{"name": "\ud83d"}]')), SURROGATES),
    "5,000 digits": (ROW[:-1] + b', "id": ' + b"9" * 5000 + b"}", "4300 digits"),
}


@pytest.fixture(autouse=True)
def digits_of_integers():
    """The longest integer that Python parses is a setting of the interpreter; this is its default."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(4300)
    yield
    sys.set_int_max_str_digits(before)


@pytest.mark.parametrize("name", [*BROKEN, *MALFORMED])
def test_a_bad_line_is_recorded_as_it_stands_and_its_neighbors_are_kept(tmp_path, name):
    content, words = {**BROKEN, **MALFORMED}[name]
    rows = read(write(tmp_path / "bad.jsonl", b"\n".join([ROW, content, OTHER])))
    rejected = refused(rows)
    assert words in rejected.detail
    assert rejected.line == 2
    assert rejected.row == content.decode("utf-8", "backslashreplace")
    assert [r.row for r in rows if isinstance(r, Conversation)] == [ROW.decode(), OTHER.decode()]
    assert questions(rows) == ["one", "two"]
    assert rejected.reason in ("broken_json", "not_utf8") if name in BROKEN else ("broken_json", "malformed_row")


@pytest.mark.parametrize("name", [*BROKEN, *MALFORMED])
def test_a_bad_item_of_an_array_costs_one_row_or_if_it_is_not_json_the_rest(tmp_path, name):
    content, words = {**BROKEN, **MALFORMED}[name]
    rows = read(write(tmp_path / "bad.json", b"[" + ROW + b",\n" + content + b",\n" + OTHER + b"]"))
    rejected = refused(rows)
    if name in MALFORMED:
        assert questions(rows) == ["one", "two"]
        assert words in rejected.detail
        assert (rejected.line, rejected.row) == (2, content.decode())
    else:
        assert questions(rows)[0] == "one"
        assert rejected.reason == "rest_of_file_unread"
        assert rejected.detail.endswith("the rest is not read")


@pytest.mark.parametrize("name", [name for name in BROKEN if "byte-order" not in name])
def test_a_bad_first_row_costs_one_row(tmp_path, name):
    """The first row decides how a file is read, so it is a case of its own."""
    rows = read(write(tmp_path / "bad.jsonl", BROKEN[name][0] + b"\n" + OTHER))
    assert questions(rows) == ["two"]
    assert refused(rows).line == 1


OTHER_FORMATS = {  # name: format, malformed row, words of its error
    "conversations a string": ("sharegpt", {"conversations": "x"}, "'conversations' must be a list of messages"),
    "unknown name": ("sharegpt", {"conversations": [{"from": "alice", "value": "x"}]}, "[0] has the role 'alice'"),
    "name a list": ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "role ['gpt']"),
    "value missing": ("sharegpt", {"conversations": [{"from": "gpt"}]}, "'content' must be text, not null"),
    "value a number": ("sharegpt", {"conversations": [{"from": "gpt", "value": 1}]}, "not the number 1"),
    "call not JSON": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "f()"}]},
        "function call is a",
    ),
    "call missing": ("sharegpt", {"conversations": [{"from": "function_call"}]}, "each with a function name"),
    "call without name": ("sharegpt", {"conversations": [{"from": "function_call", "value": "{}"}]}, "'tool_calls'"),
    "call with NaN": ("sharegpt", {"conversations": [{"from": "function_call", "value": '{"x": NaN}'}]}, "NaN"),
    "system a list": (
        "sharegpt",
        {"conversations": [user()], "system": []},
        "'system' must be text, not empty (a list)",
    ),
    "two system prompts": (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "x"}, user()], "system": "y"},
        "begins with a system message too",
    ),
    "no output": ("alpaca", {"instruction": "x"}, "no 'output' (found 'instruction')"),
    "output null": ("alpaca", {"instruction": "x", "output": None}, "'output' must be text, not null"),
    "output a list": ("alpaca", {"instruction": "x", "output": ["y"]}, "'output' must be text, not a list"),
    "instruction a number": ("alpaca", {"instruction": 1, "output": "y"}, "'instruction' must be text"),
    "input zero": (
        "alpaca",
        {"instruction": "x", "input": 0, "output": "y"},
        "'input' must be text, not the number 0",
    ),
    "history a text": ("alpaca", {"instruction": "x", "output": "y", "history": "z"}, "list of [question, answer]"),
    "history flat": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": ["a", "b"]},
        "list of [question, answer]",
    ),
    "history of three": ("alpaca", {"instruction": "x", "output": "y", "history": [["a"] * 3]}, "[question, answer]"),
    "history of numbers": ("alpaca", {"instruction": "x", "output": "y", "history": [["a", 1]]}, "must hold texts"),
    "no completion": ("prompt_completion", {"prompt": "x"}, "no 'completion' (found 'prompt')"),
    "prompt null": ("prompt_completion", {"prompt": None, "completion": [user()]}, "'prompt' must be a list"),
    "numbers": ("prompt_completion", {"prompt": 1, "completion": 2}, "'prompt' must be a list of messages"),
    "mixed": ("prompt_completion", {"prompt": "x", "completion": [user()]}, "both be text, or both be lists"),
    "empty completion": ("prompt_completion", {"prompt": [user()], "completion": []}, "not empty (a list)"),
    "bad prompt": ("prompt_completion", {"prompt": [{"role": "x"}], "completion": [user()]}, "prompt[0] has the role"),
    "another format": ("sharegpt", chat(), "no 'conversations' (found 'messages')"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_a_bad_row_of_another_format_is_named(tmp_path, name):
    data_format, bad, words = OTHER_FORMATS[name]
    rejected = refused(read(write(tmp_path / "bad.jsonl", b"\n" + line(bad)), data_format))
    assert (rejected.reason, rejected.line) == ("malformed_row", 2)
    assert words in rejected.detail


# ---- bad files ----------------------------------------------------------------------------------

MANY = b"".join(line(chat(str(i))) + b"\n" for i in range(3000))
PARQUET = pyarrow.BufferOutputStream()
CHATS = pyarrow.Table.from_pylist([chat(str(i)) for i in range(500)])
# only checksums tell damage inside the values of a page
pyarrow.parquet.write_table(CHATS, PARQUET, row_group_size=50, write_page_checksum=True)
PARQUET = PARQUET.getvalue().to_pybytes()
WRAPPER = {"data": [chat("one")]}
UNREADABLE, UNREAD = "unreadable_file", "rest_of_file_unread"
FILES = {  # name: suffix, bytes, number of good rows, then reason, line and words of the only rejection
    "empty": (".jsonl", b"", 0, "empty_file", 1, "the file holds no row"),
    "empty lines": (".jsonl", b"\n \r\n", 0, "empty_file", 1, "the file holds no row"),
    "only a mark": (".jsonl", MARK, 0, "empty_file", 1, "the file holds no row"),
    "empty array": (".json", b"[]", 0, "empty_file", 1, "the file holds no row"),
    "array of white space": (".json", b"\n[ \n]\n", 0, "empty_file", 1, "the file holds no row"),
    "empty gzip": (".jsonl.gz", gzipped(b""), 0, "empty_file", 1, "the file holds no row"),
    "wrapper": (".json", line(WRAPPER), 0, "malformed_row", 1, "list under 'data': make that the file"),
    "indented wrapper": (".json", json.dumps(WRAPPER, indent=1).encode(), 0, "malformed_row", 1, "list under 'data'"),
    "truncated last line": (".jsonl", ROW + b"\n" + OTHER[:-9], 1, "broken_json", 2, "Unterminated string"),
    "array not closed": (".json", b"[" + ROW, 1, UNREAD, 1, "a comma or the closing ] is missing"),
    "array cut in a row": (".json", b"[\n" + ROW + b",\n" + OTHER[:-9], 1, UNREAD, 3, "Unterminated string"),
    "array without comma": (".json", b"[" + ROW + b"\n" + OTHER + b"]", 1, UNREAD, 2, "comma or the closing ]"),
    "array with two commas": (".json", b"[" + ROW + b",\n," + OTHER + b"]", 1, UNREAD, 2, "Expecting value"),
    "array with final comma": (".json", b"[" + ROW + b"\n,\n]", 1, UNREAD, 3, "Expecting value"),
    "array with first comma": (".json", b"[," + ROW + b"]", 0, UNREAD, 1, "Expecting value"),
    "array with tail": (".json", b"[" + ROW + b"]\n\nx", 1, UNREAD, 3, "text after the end of the array"),
    "two arrays": (".json", b"[" + ROW + b"]\n[" + OTHER + b"]", 1, UNREAD, 2, "text after the end of the array"),
    "array closed twice": (".json", b"[" + ROW + b"]]", 1, UNREAD, 1, "text after the end of the array"),
    "array closed wrongly": (".json", b"[" + ROW + b"}", 1, UNREAD, 1, "a comma or the closing ] is missing"),
    "array only opened": (".json", b"[", 0, UNREAD, 1, "Expecting value"),
    "line of an error in an item": (".json", b"[" + ROW + b',\n{"x":\n\n oops}]', 1, UNREAD, 2, "value at line 4"),
    "latin-1 in an array": (".json", b"[" + ROW + b',\n{"\xe9": 1}]', 1, UNREAD, 2, "not UTF-8 at byte 94 ("),
    "latin-1 after an array": (".json", MARK + b"[" + ROW + b"]\n\xe9", 1, UNREAD, 2, "not UTF-8 at byte 95 ("),
    "character cut off": (".json", b"[" + ROW + b',"\xe4\xb8', 1, UNREAD, 1, "(unexpected end of data)"),
    "indented objects, one broken": (".json", INDENTED[0] + b"\n{\n" + OTHER, 1, UNREAD, 13, "property name"),
    "indented objects, one cut off": (".json", INDENTED[0] + INDENTED[1][:-9], 1, UNREAD, 12, "broken JSON"),
    "utf-16": (".json", ROW.decode().encode("utf-16"), 0, UNREADABLE, 1, "not UTF-8 at byte 0: it is UTF-16"),
    "utf-16 big-endian": (".jsonl", b"\xfe\xff" + ROW.decode().encode("utf-16-be"), 0, UNREADABLE, 1, "it is UTF-16"),
    "utf-16-le without mark": (".jsonl", ROW.decode().encode("utf-16-le"), 0, UNREADABLE, 1, "iconv -f UTF-16LE"),
    "utf-16-be without mark": (
        ".json",
        f"[{ROW.decode()}]".encode("utf-16-be"),
        0,
        UNREADABLE,
        1,
        "iconv -f UTF-16BE",
    ),
    "gzip named .jsonl": (".jsonl", gzipped(ROW), 0, UNREADABLE, 1, "it is gzip: name it .gz"),
    "zstd named .json": (".json", zstandard(ROW), 0, UNREADABLE, 1, "it is Zstandard: name it .zst"),
    "parquet named .jsonl": (".jsonl", PARQUET, 0, UNREADABLE, 1, "it is Parquet: name it .parquet"),
    "lines named .gz": (".jsonl.gz", ROW, 0, UNREADABLE, 1, "damaged after line 0 (Not a gzipped file"),
    "lines named .zst": (".jsonl.zst", ROW, 0, UNREADABLE, 1, "damaged after line 0 (ZSTD decompress failed"),
    "lines named .parquet": (".parquet", ROW, 0, UNREADABLE, 1, "Parquet magic bytes not found"),
    "empty .parquet": (".parquet", b"", 0, UNREADABLE, 1, "damaged after line 0 (Parquet file size is 0"),
    "gzip cut at its end": (".jsonl.gz", gzipped(MANY)[:-5], 3000, UNREADABLE, 3001, "end-of-stream marker"),
    "gzip with a wrong sum": (".jsonl.gz", gzipped(MANY)[:-8] + bytes(8), 3000, UNREADABLE, 3001, "CRC check"),
    "gzip with a tail": (".jsonl.gz", gzipped(MANY) + b"x", 3000, UNREADABLE, 3001, "damaged after line 3000"),
    "zstd cut off": (".jsonl.zst", zstandard(ROW)[:-3], 0, UNREADABLE, 1, "Truncated compressed stream"),
    "parquet cut off": (".parquet", PARQUET[:-50], 0, UNREADABLE, 1, "damaged after line 0 (Parquet magic bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_gives_its_good_rows_and_one_rejection(tmp_path, name):
    suffix, content, good, reason, number, words = FILES[name]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    rows = read(path)
    rejected = refused(rows)
    assert words in rejected.detail
    assert (rejected.reason, rejected.line, len(rows) - 1) == (reason, number, good)
    assert rows[-1] is rejected


def test_rows_before_damage_are_kept(tmp_path):
    """A compressed file is cut in the middle, with lines and with an array; a Parquet file gets a hole."""
    texts = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(5000)]
    rows = [line(chat(text)) for text in texts]
    contents = {".jsonl": b"\n".join(rows), ".json": b"[" + b",".join(rows) + b"]"}
    for suffix, content in contents.items():
        for packed_suffix, compress in ((".gz", gzipped), (".zst", zstandard)):
            packed = compress(content)
            path = tmp_path / f"cut{suffix}{packed_suffix}"
            path.write_bytes(packed[: len(packed) // 2])
            kept = read(path)
            assert refused(kept).reason == UNREADABLE
            assert 1000 < len(kept) - 1 < 5000
            assert questions(kept) == texts[: len(kept) - 1]
    hole = len(PARQUET) // 2
    (tmp_path / "hole.parquet").write_bytes(PARQUET[:hole] + bytes(200) + PARQUET[hole + 200 :])
    kept = read(tmp_path / "hole.parquet")
    rejected = refused(kept)
    assert (rejected.reason, rejected.line) == (UNREADABLE, len(kept))
    assert questions(kept) == [str(i) for i in range(len(kept) - 1)]


def test_parquet_with_two_columns_of_one_name_or_text_that_is_not_utf8_is_unreadable(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array([chat(text)["messages"]]) for text in ("one", "two")]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["messages", "messages"]), path)
    assert "two columns have the same name: messages, messages" in refused(read(path)).detail
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xe9"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": latin, "completion": latin}), path)
    assert "can't decode byte 0xe9" in refused(read(path)).detail


@pytest.mark.parametrize("chunk", [1 << 16, 1 << 22])
@pytest.mark.parametrize("shape", ["lines", "array"])
def test_rows_beyond_the_longest_are_rejected(tmp_path, monkeypatch, shape, chunk):
    """The limit holds whether or not the row is whole in the window."""
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1 << 20)
    monkeypatch.setattr(text_window, "CHUNK_BYTES", chunk)
    rows = [ROW, line(chat("x" * (1 << 20))), OTHER]
    content, reason = {
        "lines": (b"\n".join(rows), "row_too_long"),
        "array": (b"[" + b",\n".join(rows) + b"]", "rest_of_file_unread"),
    }[shape]
    kept = read(write(tmp_path / "a.json", content))
    rejected = refused(kept)
    assert (questions(kept), rejected.line, rejected.reason) == (["one"], 2, reason)
    assert "of more than 1 MiB" in rejected.detail
    assert len(rejected.row) < len(rows[1]) + 100


@pytest.mark.parametrize("chunk", range(1, 12))
def test_numbers_are_whole_wherever_the_reads_of_a_file_end(tmp_path, monkeypatch, chunk):
    """That a number has ended is known only from the next character."""
    monkeypatch.setattr(text_window, "CHUNK_BYTES", chunk)
    rows = read(write(tmp_path / "a.json", b"[1.25,-2.5e+10 ,30,true,-0.5E-3, " + ROW + b"]"))
    numbers = ["the number 1.25", "the number -25000000000.0", "the number 30", "true or false", "the number -0.0005"]
    assert [row.detail for row in rows[:-1]] == [f"a row must be a JSON object, not {number}" for number in numbers]
    assert questions(rows) == ["one"]
