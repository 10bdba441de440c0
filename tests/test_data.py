"""Reading, validating, merging, splitting, tokenising and reporting: nothing is lost or changed in silence."""

import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
from conftest import CHATML_TEMPLATE, write_jsonl

from chat_format import ChatFormat
from data_files import Conversation, Rejected, find_data_files, read_rows
from data_report import report_table, show_row, write_report
from data_utils import load_conversations, prepare_data, reject_untrainable, tokenize_conversations
from dist_logger import UserError


def chat(question: str = "Q", answer: str = "A", **columns) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


def line(row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@pytest.fixture
def chat_format(tokenizer) -> ChatFormat:
    tokenizer.chat_template = CHATML_TEMPLATE
    return ChatFormat(tokenizer)


@pytest.fixture
def prepare(chat_format):
    """prepare_data with the settings that a test doesn't care about filled in."""

    def call(data_files, eval_data_files=None, **settings):
        defaults = {
            "max_length": 512,
            "validation_split_percentage": 0.0,
            "max_eval_samples": None,
            "data_validation": "standard",
            "num_workers": 1,
            "seed": 0,
            "progress": False,
        }
        paths = [str(p) for p in data_files]
        eval_paths = [str(p) for p in eval_data_files] if eval_data_files else None
        return prepare_data(paths, eval_paths, chat_format, **{**defaults, **settings})

    return call


# ---- what is accepted ---------------------------------------------------------------------------

ROW, OTHER = line(chat("one")), line(chat("two"))
ACCEPTED = {
    "lines": ROW + b"\n" + OTHER + b"\n",
    "no final newline": ROW + b"\n" + OTHER,
    "windows line ends": ROW + b"\r\n" + OTHER + b"\r\n",
    "blank lines": b"\n" + ROW + b"\n\n  \n" + OTHER + b"\n\n",
    "byte-order mark": b"\xef\xbb\xbf" + ROW + b"\n" + OTHER,
    "array": b"[" + ROW + b", " + OTHER + b"]",
    "indented array": json.dumps([chat("one"), chat("two")], indent=2).encode(),
    "array with mark": b"\xef\xbb\xbf \n[\n" + ROW + b"\n,\n" + OTHER + b"\n]\n\n",
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_ways_to_write_the_same_rows(tmp_path, name, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(ACCEPTED[name])
    rows = list(read_rows(str(path)))
    assert [r.messages[0]["content"] for r in rows] == ["one", "two"]
    lines = path.read_bytes().split(b"\n")
    first_line = next(i for i, text in enumerate(lines, 1) if text.strip(b"\xef\xbb\xbf \r[") != b"")
    assert rows[0].line == first_line


def test_text_is_kept_word_for_word(tmp_path):
    """Dates, numbers in text, NUL, U+2028 and JSON look-alikes survive; other columns may clash."""
    texts = ["2024-01-02T03:04:05Z", "1.50", "a\u2028b\x85c", "nul\x00", '{"a": 1}', "null", "  x \n", "\U0001f600"]
    rows = [chat(t, t, id=i if i % 2 else str(i), meta=[{"x": 1}, None, 3.5][i % 3]) for i, t in enumerate(texts)]
    rows.append(chat("x", "y", meta={"x": {"y": []}}))
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    read = list(read_rows(str(path)))
    assert [[m["content"] for m in r.messages] for r in read] == [[t, t] for t in texts] + [["x", "y"]]


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    row = line(chat())[:-1] + b', "score": NaN, "meta": {"a": 1, "a": 2}, "id": 1, "id": 2}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(row)
    assert next(read_rows(str(path))).messages == chat()["messages"]


def test_messages_tools_and_template_arguments_pass_through(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "assistant", "content": "done"},
    ]
    row = {"messages": messages, "tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}}
    read = next(read_rows(str(write_jsonl(tmp_path / "a.jsonl", [row]))))
    assert read.messages == [{**messages[0], "content": "ab"}, {**messages[1], "content": ""}, *messages[2:]]
    assert read.tools == row["tools"]
    assert read.template_kwargs == row["chat_template_kwargs"]


# ---- what is refused ----------------------------------------------------------------------------

MALFORMED = {
    "broken": (b'{"messages": [', "Expecting value"),
    "trailing comma": (b'{"messages": [],}', "property name"),
    "two objects": (ROW + b" " + OTHER, "Extra data"),
    "duplicate key": (b'{"messages": [], "messages": []}', "'messages' stands twice"),
    "nan": (b'{"messages": [{"role": "user", "content": "x", "weight": NaN}]}', "NaN and Infinity are not JSON"),
    "infinity": (b'{"messages": [1], "tools": [{"x": -Infinity}]}', "NaN and Infinity are not JSON"),
    "duplicate key inside": (b'{"messages": [{"role": "user", "role": "user"}]}', "'role' stands twice"),
    "surrogate": (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', "surrogate"),
    "huge integer": (b'{"x": ' + b"9" * 5000 + b"}", "4300 digits"),
    "deep": (b"[" * 0 + b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "scalar": (b"3", "must be a JSON object, not the number 3"),
    "null": (b"null", "not null"),
    "text": (b'"hello"', "not text"),
    "no messages": (b'{"text": "x"}', "no 'messages' (found 'text')"),
    "wrapper": (b'{"data": [' + ROW + b"]}", "rows seem to be the list under 'data'"),
    "messages a string": (b'{"messages": "x"}', "'messages' must be a list of messages, not text"),
    "messages empty": (b'{"messages": []}', "not empty (a list)"),
    "message a string": (b'{"messages": ["x"]}', "messages[0] must be an object"),
    "role human": (line({"messages": [{"role": "human", "content": "x"}]}), "role 'human'; allowed are system"),
    "role User": (line({"messages": [{"role": "User", "content": "x"}]}), "role 'User'"),
    "no role": (line({"messages": [{"content": "x"}]}), "role None"),
    "content number": (line({"messages": [{"role": "user", "content": 3}]}), "'content' must be text"),
    "content null": (line({"messages": [{"role": "user", "content": None}]}), "must be text, not null"),
    "image": (line({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "only text parts"),
    "tool call": (line({"messages": [{"role": "assistant", "content": "", "tool_calls": ["f"]}]}), "'tool_calls'"),
    "tools": (line({**chat(), "tools": "f"}), "'tools' must be a list"),
    "not utf-8": ('{"messages": "é"}'.encode("latin-1"), "not UTF-8 at byte"),
    "utf-16": ('{"messages": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "empty": (b"", "the file is empty"),
    "empty array": (b"[]", "empty list"),
    "array without end": (b"[" + ROW, "closing ] is missing"),
    "array without comma": (b"[" + ROW + b" " + OTHER + b"]", "comma or the closing ]"),
    "array with tail": (b"[" + ROW + b"] x", "after the end of the JSON array"),
    "array with final comma": (b"[" + ROW + b",]", "Expecting value"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_is_named_with_its_place(tmp_path, prepare, name):
    content, message = MALFORMED[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare([path])
    assert message in str(caught.value)
    assert f"{path}:1: " in str(caught.value)


def test_the_line_of_an_error_is_that_of_the_file(tmp_path, prepare):
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROW + b"\n\n" + OTHER + b"\n{\n")
    with pytest.raises(UserError, match=r"a\.jsonl:4: broken JSON"):
        prepare([path])
    path.write_text(json.dumps([chat(), {"text": "x"}], indent=1))
    with pytest.raises(UserError, match=r"a\.jsonl:14: no 'messages'"):
        prepare([path])


def test_the_first_twenty_errors_and_the_count_are_shown(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": i} for i in range(30)])
    with pytest.raises(UserError) as caught:
        prepare([path])
    message = str(caught.value)
    assert "30 rows can't be used (30 malformed_row)" in message
    assert message.count("a.jsonl:") == 20
    assert "and 10 more" in message


def test_missing_files_are_all_named(tmp_path, prepare):
    other = tmp_path / "notes.txt"
    other.write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        prepare([tmp_path / "no1.jsonl", tmp_path / "no2.jsonl", other, tmp_path / "empty"])
    for name in ("no1.jsonl: no such file", "no2.jsonl: no such file", "notes.txt: not a", "no .json or .jsonl file"):
        assert name in str(caught.value)


def test_directories_and_globs(tmp_path):
    for name in ("b.jsonl", "a.json", "deep/c.jsonl", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ROW)
    found = find_data_files([str(tmp_path)], "data_files")
    assert found == [str(tmp_path / n) for n in ("a.json", "b.jsonl", "deep/c.jsonl")]
    assert find_data_files([str(tmp_path / "*.jsonl"), str(tmp_path / "b.jsonl")], "data_files") == [found[1]]
    assert find_data_files([found[1], str(tmp_path / "deep" / ".." / "b.jsonl")], "data_files") == [found[1]]


# ---- the three modes ----------------------------------------------------------------------------


@pytest.fixture
def mixed_file(tmp_path):
    """Two good rows, one malformed, and three without anything to learn."""
    user = {"role": "user", "content": "Q"}
    rows = [
        chat("good"),
        {"text": "malformed"},
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": "  "}]},
        chat("long " * 200),
        chat("good too"),
    ]
    return write_jsonl(tmp_path / "mixed.jsonl", rows)


def test_standard_stops_at_malformed_rows_alone(mixed_file, prepare):
    with pytest.raises(UserError, match="1 rows can't be used"):
        prepare([mixed_file], max_length=64)
    rows = [text for i, text in enumerate(mixed_file.read_text().splitlines()) if i != 1]
    mixed_file.write_text("\n".join(rows))
    data = prepare([mixed_file], max_length=64)
    assert len(data.train) == 2


def test_strict_stops_at_all(mixed_file, prepare):
    rows = [text for i, text in enumerate(mixed_file.read_text().splitlines()) if i != 1]
    mixed_file.write_text("\n".join(rows))
    with pytest.raises(UserError, match="2 rows can't be used.*no_assistant_turn"):
        prepare([mixed_file], max_length=64, data_validation="strict")
    write_jsonl(mixed_file, [chat("long " * 200), chat()])
    with pytest.raises(UserError, match="nothing_left_after_truncation"):
        prepare([mixed_file], max_length=64, data_validation="strict")


def test_lenient_drops_all_and_records_them(mixed_file, prepare, tmp_path):
    data = prepare([mixed_file], max_length=64, data_validation="lenient")
    write_report(data.report, data.rejected, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    total = report["total"]
    assert (total["rows_read"], total["kept"]) == (6, 2)
    assert total["rejected"] == {
        "malformed_row": 1,
        "no_assistant_turn": 1,
        "no_assistant_text": 1,
        "nothing_left_after_truncation": 1,
    }
    assert report["files"][0]["path"] == str(mixed_file)
    assert total["tokens"] == sum(len(r.example.input_ids) for r in data.train)
    assert total["supervised_tokens"] == sum(r.example.num_supervised for r in data.train)
    recorded = [json.loads(text) for text in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in recorded] == [
        (2, "malformed_row"),
        (3, "no_assistant_turn"),
        (4, "no_assistant_text"),
        (5, "nothing_left_after_truncation"),
    ]
    source = mixed_file.read_text().splitlines()
    for row in recorded:
        assert row["row"] == source[row["line"] - 1]
    assert "dropped: 1 malformed_row" in report_table(report)


def test_an_array_broken_in_the_middle_is_said_and_recorded_whole(tmp_path, prepare, caplog):
    path = tmp_path / "a.json"
    rest = b"{oops}, " + b", ".join([OTHER] * 50) + b"]"
    path.write_bytes(b"[" + ROW + b", " + rest)
    data = prepare([path], data_validation="lenient")
    assert len(data.train) == 1
    assert data.report["total"]["rejected"] == {"rest_of_file_unread": 1}
    assert data.rejected[0].row == rest.decode()
    assert f"{path}:1: broken JSON" in caplog.text
    assert "the rest of the file is not read" in caplog.text


def test_tool_calls_nested_too_deeply_are_rejected(tmp_path, prepare):
    deep = chat()
    deep["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": json.loads("[" * 700 + "]" * 700)}}]
    path = write_jsonl(tmp_path / "a.jsonl", [chat(), deep])
    data = prepare([path], data_validation="lenient")
    assert len(data.train) == 1
    assert "nested too deeply" in data.rejected[0].detail


def test_nothing_left_says_why(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "Q"}]}] * 3)
    with pytest.raises(UserError, match=r"no row of --data_files is left: 3 no_assistant_turn") as caught:
        prepare([path])
    assert f"{path}:1" in str(caught.value)


# ---- splitting and merging ----------------------------------------------------------------------


def origin(rows) -> list[tuple[str, int]]:
    return [(r.path, r.line) for r in rows]


def test_split_is_deterministic_and_loses_nothing(tmp_path, prepare):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [chat(str(i)) for i in range(30)]) for n in "ab"]
    data = prepare(files, validation_split_percentage=10)
    assert len(data.held_out) == 6
    assert sorted(origin(data.train) + origin(data.held_out)) == sorted(
        (str(f), i) for f in files for i in range(1, 31)
    )
    assert origin(prepare(files, validation_split_percentage=10).held_out) == origin(data.held_out)
    assert origin(prepare(files, validation_split_percentage=10, seed=1).held_out) != origin(data.held_out)
    capped = prepare(files, validation_split_percentage=10, max_eval_samples=2)
    assert (len(capped.train), len(capped.held_out)) == (58, 2)
    assert prepare(files).held_out == []
    assert len(prepare(files, validation_split_percentage=0.01).held_out) == 1


def test_a_split_that_leaves_nothing_is_refused(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat()])
    with pytest.raises(UserError, match="can't be split"):
        prepare([path], validation_split_percentage=5)


def test_evaluation_files(tmp_path, prepare):
    train = write_jsonl(tmp_path / "train.jsonl", [chat(str(i)) for i in range(5)])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [chat(str(i)) for i in range(20)])
    data = prepare([train], [held_out], validation_split_percentage=50)
    assert (len(data.train), len(data.held_out)) == (5, 20)
    data = prepare([train], [held_out], max_eval_samples=7)
    assert {r.path for r in data.held_out} == {str(held_out)}
    assert len(data.held_out) == 7


def test_evaluating_on_the_training_data_is_said(tmp_path, prepare, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(str(i)) for i in range(5)])
    data = prepare([path], [path])
    assert len(data.train) == len(data.held_out) == 5
    assert data.report["total"]["rows_read"] == 5
    assert "both training and evaluation data" in caplog.text


def test_a_killed_worker_ends_the_run(tmp_path, chat_format, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(300)])
    conversations, _, _ = load_conversations([str(path)], progress=False)
    monkeypatch.setattr(chat_format, "encode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BrokenProcessPool):
        tokenize_conversations(conversations, chat_format, 64, num_workers=2, progress=False)


def test_workers_give_the_same_rows(tmp_path, chat_format):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}", f"answer {i}") for i in range(300)])
    conversations, _, read = load_conversations([str(path)], progress=False)
    alone, _ = tokenize_conversations(conversations, chat_format, 64, num_workers=1, progress=False)
    together, _ = tokenize_conversations(conversations, chat_format, 64, num_workers=2, progress=False)
    assert read[str(path)] == len(alone) == 300
    assert origin(alone) == origin(together)
    for a, b in zip(alone, together, strict=True):
        assert a.example.input_ids.tolist() == b.example.input_ids.tolist()
        assert a.example.labels.tolist() == b.example.labels.tolist()


def test_dataset_columns(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(10)])
    data = prepare([path], validation_split_percentage=20)
    datasets = data.to_dataset_dict()
    assert {name: len(rows) for name, rows in datasets.items()} == {"train": 8, "eval": 2}
    assert datasets["train"][3]["input_ids"] == data.train[3].example.input_ids.tolist()
    assert datasets["train"][3]["labels"] == data.train[3].example.labels.tolist()
    assert datasets["train"].features["labels"].feature.dtype == "int32"


def test_show_row_marks_what_is_supervised(tmp_path, prepare, tokenizer):
    data = prepare([write_jsonl(tmp_path / "a.jsonl", [chat("Why?", "Because.")])])
    shown = show_row(data.train[0], tokenizer, color=False)
    assert "<|im_start|>assistant\n[[Because.<|im_end|>]]\n" in shown
    assert shown.count("[[") == 1
    assert "\033[32mBecause.<|im_end|>\033[0m" in show_row(data.train[0], tokenizer, color=True)


def test_an_assistant_that_only_calls_tools_is_trainable():
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    row = Conversation([{"role": "user", "content": "Q"}, turn], None, None, "p", 1, "")
    assert reject_untrainable(row) is row
    silent = Conversation([{"role": "assistant", "content": " "}], None, None, "p", 1, "")
    assert isinstance(reject_untrainable(silent), Rejected)
