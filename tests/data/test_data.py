"""Reading, validating, merging, splitting, tokenizing and reporting: nothing is lost or changed in silence."""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

import data_utils
from data_utils import load_conversations, prepare_data, tokenize_dataset
from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.data import build
from dft.data import cache as data_cache
from dft.data.cache import cached
from dft.data.page import write_page
from dft.data.report import report_table, report_warnings, show_row
from dft.data.show import show_data
from dft.errors import UserError
from dft.reading.rows import Conversation, RejectedRow
from dft.reading.strict_json import MAX_NESTING
from dft.reading.untrainable import reject_untrainable
from tests.helpers import CHATML_TEMPLATE, ROOT, run, write_jsonl


def chat(question: str = "Q", answer: str = "A", **columns) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


@pytest.fixture
def chat_format(tokenizer) -> ChatFormat:
    tokenizer.chat_template = CHATML_TEMPLATE
    return ChatFormat(tokenizer)


@pytest.fixture
def prepare(chat_format, tmp_path):
    """prepare_data with the settings that a test doesn't care about filled in."""

    def call(data_files, eval_data_files=None, **settings):
        defaults = {
            "max_length": 512,
            "validation_split_percentage": 0.0,
            "max_eval_samples": None,
            "preprocessing_num_workers": 1,
            "data_cache_dir": str(tmp_path / "cache"),
        }
        paths = [str(p) for p in data_files]
        eval_paths = [str(p) for p in eval_data_files] if eval_data_files else None
        seed = settings.pop("seed", 0)
        config = DataConfig(paths, eval_paths, **{**defaults, **settings})
        return prepare_data(config, chat_format, seed=seed, progress=False)

    return call


def rejected_rows(data) -> list[dict]:
    return [json.loads(text) for text in (data.directory / "rejected.jsonl").read_text().splitlines()]


def texts(dataset, tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in dataset["input_ids"]] if dataset is not None else []


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
    with pytest.raises(UserError, match="1 row can't be used"):
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


def test_lenient_drops_all_and_records_them(mixed_file, prepare):
    data = prepare([mixed_file], max_length=64, data_validation="lenient")
    total = data.report["total"]
    assert (total["rows_read"], total["kept"]) == (6, 2)
    assert total["rejected"] == {
        "malformed_row": 1,
        "no_assistant_turn": 1,
        "no_assistant_text": 1,
        "nothing_left_after_truncation": 1,
    }
    assert data.report["files"][0]["path"] == str(mixed_file)
    assert total["tokens"] == sum(map(len, data.train["input_ids"]))
    assert total["supervised_tokens"] == sum(int((np.array(row[1:]) != -100).sum()) for row in data.train["labels"])
    recorded = rejected_rows(data)
    assert [(r["line"], r["reason"]) for r in recorded] == [
        (2, "malformed_row"),
        (3, "no_assistant_turn"),
        (4, "no_assistant_text"),
        (5, "nothing_left_after_truncation"),
    ]
    source = mixed_file.read_text().splitlines()
    for row in recorded:
        assert row["row"] == source[row["line"] - 1]
    assert "dropped: 1 malformed_row" in report_table(data.report)


def test_an_array_broken_in_the_middle_is_recorded(tmp_path, prepare):
    path = tmp_path / "a.json"
    good = json.dumps(chat())
    rest = "{oops}, " + ", ".join([good] * 50) + "]"
    path.write_text(f"[{good}, {rest}")
    data = prepare([path], data_validation="lenient")
    assert len(data.train) == 1
    assert data.report["total"]["rejected"] == {"rest_of_file_unread": 1}
    assert rejected_rows(data)[0]["row"] == rest


def test_tool_calls_nested_beyond_the_limit_are_rejected(tmp_path, prepare):
    rows = [chat()]
    for levels in (MAX_NESTING - 5, MAX_NESTING - 4):  # five levels are around the arguments of a call
        rows.append(chat())
        arguments = json.loads("[" * levels + "]" * levels)
        rows[-1]["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": arguments}}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = prepare([path], data_validation="lenient")
    assert len(data.train) == 2
    (rejected,) = rejected_rows(data)
    assert (rejected["line"], rejected["reason"]) == (3, "malformed_row")
    assert "nested too deeply" in rejected["detail"]


def test_nothing_left_says_why(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "Q"}]}] * 3)
    with pytest.raises(UserError, match=r"no row of --data_files is left: 3 no_assistant_turn") as caught:
        prepare([path])
    assert f"{path}:1" in str(caught.value)


def test_evaluation_files_without_a_good_row_are_said_and_nothing_is_held_out_instead(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(str(i)) for i in range(50)])
    bad = write_jsonl(tmp_path / "e.jsonl", [{"messages": [{"role": "user", "content": "Q"}]}])
    with pytest.raises(UserError, match="no row of --eval_data_files is left: 1 no_assistant_turn"):
        prepare([path], [bad], validation_split_percentage=5)
    with pytest.raises(UserError, match="no row of --data_files is left: 1 no_assistant_turn"):
        prepare([bad], validation_split_percentage=5)


# ---- choosing: see also test_selection.py ---------------------------------------------------------


def test_splitting_loses_nothing_and_is_the_same_each_time(tmp_path, prepare, tokenizer):
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [chat(f"{n}{i}") for i in range(30)]) for n in "ab"]
    data = prepare(files, validation_split_percentage=10)
    assert (len(data.train), len(data.evaluation)) == (54, 6)
    everything = texts(prepare(files).train, tokenizer)
    held_out = texts(data.evaluation, tokenizer)
    assert sorted(texts(data.train, tokenizer) + held_out) == sorted(everything)
    assert set(texts(prepare(files[::-1], validation_split_percentage=10).evaluation, tokenizer)) == set(held_out)
    assert texts(prepare(files, validation_split_percentage=10, seed=1).evaluation, tokenizer) != held_out
    capped = prepare(files, validation_split_percentage=10, max_eval_samples=2)
    assert (len(capped.train), len(capped.evaluation)) == (58, 2)
    assert prepare(files).evaluation is None


def test_a_split_that_leaves_nothing_is_refused(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat()] * 5)
    with pytest.raises(UserError, match="5 rows with 1 different prompts can't be split"):
        prepare([path], validation_split_percentage=5)


def test_evaluation_files(tmp_path, prepare, tokenizer):
    train = write_jsonl(tmp_path / "train.jsonl", [chat(f"t{i}") for i in range(5)])
    held_out = write_jsonl(tmp_path / "eval.jsonl", [chat(f"e{i}") for i in range(20)])
    data = prepare([train], [held_out], validation_split_percentage=50)
    assert (len(data.train), len(data.evaluation)) == (5, 20)
    data = prepare([train], [held_out], max_eval_samples=7)
    assert len(data.evaluation) == 7
    assert all("user\ne" in text for text in texts(data.evaluation, tokenizer))
    assert data.report["files"][1]["not_sampled"] == 13


def test_weights_that_leave_nothing_are_refused(tmp_path, prepare):
    with pytest.raises(UserError, match="--data_weights .* leave no row"):
        prepare([write_jsonl(tmp_path / "a.jsonl", [chat()])], data_weights=[0.0])


def test_one_file_with_two_samples_is_refused(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(str(i)) for i in range(20)])
    with pytest.raises(UserError, match="named twice, with different samples or weights"):
        prepare([path, f"{path}#5"])
    with pytest.raises(UserError, match="take different samples of"):
        prepare([path], [f"{path}#5"])


def test_parquet_with_dates_in_its_messages(tmp_path, prepare):
    messages = [{**message, "sent": datetime(2026, 1, 1)} for message in chat()["messages"]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    assert len(prepare([tmp_path / "a.parquet"]).train) == 1


def test_evaluating_on_the_training_data_is_said(tmp_path, prepare, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(str(i)) for i in range(5)])
    data = prepare([path], [path])
    assert len(data.train) == len(data.evaluation) == 5
    assert data.report["total"]["rows_read"] == data.report["total"]["leaked"] == 5
    assert "both training and evaluation data" in caplog.text
    with pytest.raises(UserError, match="--drop_leaked leaves no training row"):
        prepare([path], [path], drop_leaked=True)


def test_duplicates_and_leaks_are_dropped_on_request_and_recorded(tmp_path, prepare):
    first = write_jsonl(tmp_path / "a.jsonl", [chat("one"), chat("two"), chat("one")])
    alpaca = [{"instruction": " one", "output": "A"}, {"instruction": "three", "output": "A"}]
    second = write_jsonl(tmp_path / "b.jsonl", alpaca)
    held_out = write_jsonl(tmp_path / "e.jsonl", [chat("three", "another answer")])
    data = prepare([first, second], [held_out])
    assert (data.report["total"]["duplicates"], data.report["total"]["leaked"], len(data.train)) == (2, 1, 5)
    assert "--dedup True drops them" in report_table(data.report)
    data = prepare([first, second], [held_out], dedup=True, drop_leaked=True, data_validation="strict")
    assert len(data.train) == 2
    assert [(Path(r["path"]).name, r["line"], r["reason"]) for r in rejected_rows(data)] == [
        ("a.jsonl", 3, "duplicate"),
        ("b.jsonl", 1, "duplicate"),
        ("b.jsonl", 2, "leaked"),
    ]
    assert json.loads(rejected_rows(data)[1]["row"]) == alpaca[0]


def test_samples_and_weights(tmp_path, prepare, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", [chat(f"a{i}") for i in range(50)])
    b = write_jsonl(tmp_path / "b.jsonl", [chat(f"b{i}") for i in range(10)])
    data = prepare([f"{a}#8", b], data_weights=[0.5, 2.5])
    rows = texts(data.train, tokenizer)
    of_a = [text for text in rows if "user\na" in text]
    assert len(of_a) == len(set(of_a)) == 4
    assert (len(rows) - len(of_a), len(set(rows) - set(of_a))) == (25, 10)
    assert data.report["files"][0]["not_sampled"] == 42
    assert [len(some) for some in data.training_lengths()] == [4, 25]


# ---- tokenizing ---------------------------------------------------------------------------------


def test_a_killed_worker_ends_the_run(tmp_path, chat_format, monkeypatch, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(300)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(chat_format, "encode_batch", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BrokenProcessPool):
        prepare([path], preprocessing_num_workers=2)
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_workers_give_the_same_rows(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [chat(f"{n}{i}", f"no. {i}") for i in range(400)]) for n in "ab"]
    alone = prepare(files, preprocessing_num_workers=1, data_cache_dir=tmp_path / "1").train
    together = prepare(files, preprocessing_num_workers=2, data_cache_dir=tmp_path / "2").train
    assert len(alone) == 800
    assert alone.to_dict() == together.to_dict()


def test_columns(tmp_path, prepare, chat_format):
    rows = [chat(f"q{i}") for i in range(10)]
    data = prepare([write_jsonl(tmp_path / "a.jsonl", rows)], validation_split_percentage=20)
    assert (len(data.train), len(data.evaluation)) == (8, 2)
    assert data.train.column_names == ["input_ids", "labels"]
    assert data.train.features["labels"].feature.dtype == "int32"
    expected = [chat_format.encode(row["messages"]) for row in rows]
    everything = [*data.train["input_ids"], *data.evaluation["input_ids"]]
    assert sorted(everything) == sorted(e.input_ids.tolist() for e in expected)


def test_message_weights_become_a_column(tmp_path, prepare):
    weighted = chat()
    weighted["messages"][1]["weight"] = 0.25
    data = prepare([write_jsonl(tmp_path / "a.jsonl", [weighted, chat("plain")])])
    for row, weight in zip(data.train, (0.25, 1.0), strict=True):
        assert {w for w, label in zip(row["loss_weights"], row["labels"], strict=True) if label != -100} == {weight}
        assert len(row["loss_weights"]) == len(row["labels"])


@pytest.mark.parametrize(("truncation", "length"), [("right", 40), ("left", 40), ("drop", None), ("error", None)])
def test_longer_rows(tmp_path, prepare, truncation, length):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("short"), chat("Q", "word " * 100)])
    if truncation == "error":
        with pytest.raises(UserError, match=r"1 row can't be used \(1 too_long\). Raise --max_length") as caught:
            prepare([path], max_length=40, truncation=truncation)
        assert f"{path}:2: " in str(caught.value)
        return
    data = prepare([path], max_length=40, truncation=truncation)
    assert [len(ids) for ids in data.train["input_ids"][1:]] == ([length] if length else [])
    assert data.report["total"]["rejected"] == ({} if length else {"too_long": 1})


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, prepare, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("one"), chat("two")])
    select = build.select

    def select_and_change(*args, **settings):
        path.write_text(json.dumps(chat("one")))
        return select(*args, **settings)

    monkeypatch.setattr(build, "select", select_and_change)
    with pytest.raises(UserError, match="was changed while it was being read"):
        prepare([path])


def test_the_library_path_gives_the_same_tokens(tmp_path, prepare, chat_format):
    path = write_jsonl(
        tmp_path / "a.jsonl", [chat("one"), {"messages": [{"role": "user", "content": "Q"}]}, chat("x")]
    )
    rows = list(load_conversations([str(path)]))
    assert [type(row) for row in rows] == [Conversation, RejectedRow, Conversation]
    dataset, rejected = tokenize_dataset(rows[::2], chat_format, max_length=512)
    assert dataset.to_dict() == prepare([path]).train.to_dict()
    assert rejected == []
    nothing, rejected = tokenize_dataset(rows[::2], chat_format, max_length=3)
    assert (len(nothing), [row.reason for row in rejected]) == (0, ["nothing_left_after_truncation"] * 2)


def test_an_assistant_that_only_calls_tools_is_trainable():
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    row = Conversation([{"role": "user", "content": "Q"}, turn], None, None, "p", 1, "")
    assert reject_untrainable(row) is row
    silent = Conversation([{"role": "assistant", "content": " "}], None, None, "p", 1, "")
    assert isinstance(reject_untrainable(silent), RejectedRow)


# ---- the cache ----------------------------------------------------------------------------------


def test_data_is_prepared_once_and_again_when_anything_changes(tmp_path, prepare, chat_format, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [chat("one"), chat("two")])
    built = []
    monkeypatch.setattr(data_utils, "build", lambda *a, **k: built.append(1) or build.build(*a, **k))
    first = prepare([path])
    assert prepare([path], preprocessing_num_workers=2).train.to_dict() == first.train.to_dict()
    assert len(built) == 1
    prepare([path], max_length=100)
    prepare([path], overwrite_cache=True)
    os.utime(path, (0, 0))  # the content counts, not the time
    prepare([path])
    assert len(built) == 3
    write_jsonl(path, [chat("one"), chat("2wo")])
    assert prepare([path]).train.to_dict() != first.train.to_dict()
    chat_format.tokenizer.chat_template += " "
    prepare([path])
    chat_format.tokenizer.add_tokens(["newtoken"])
    prepare([path])
    chat_format.train_on = "last"
    prepare([path])
    assert len(built) == 7


def _slow_build(directory: Path) -> None:
    (directory / "half").touch()
    time.sleep(1)
    (directory / "whole").touch()
    with open(directory.parent / "builds", "a") as file:
        file.write("built\n")


def _cached_slowly(directory: Path) -> None:
    cached(directory, "key", _slow_build)


def test_two_at_once_build_once_and_a_killed_build_leaves_nothing(tmp_path):
    fork = multiprocessing.get_context("fork")
    killed = fork.Process(target=_cached_slowly, args=(tmp_path,))
    killed.start()
    while not (tmp_path / "key.unfinished" / "half").exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    two = [fork.Process(target=_cached_slowly, args=(tmp_path,)) for _ in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "builds").read_text() == "built\n"
    assert sorted(p.name for p in (tmp_path / "key").iterdir()) == ["checksums.json", "half", "whole"]
    assert not (tmp_path / "key.unfinished").exists()


def test_the_key_covers_all_the_code_that_makes_the_data():
    """Every module of the project that data_utils needs lies in a data room, or doesn't decide what is made.

    The selection of rows, which data_utils has for notebooks, is none of it.
    """
    script = "import sys, data_utils; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', 0)))"
    loaded = {Path(name) for name in run([sys.executable, "-c", script]).stdout.split()}
    ours = {path.relative_to(ROOT) for path in loaded if path.is_relative_to(ROOT) and ".venv" not in path.parts}
    others = {path for path in ours if path.parent.name not in (*data_cache.ROOMS, "config", "selection")}
    shared = ("__init__", "constants", "distributed", "errors", "files", "interface", "launched", "printable")
    assert {str(path) for path in others} == {"data_utils.py", *(f"dft/{name}.py" for name in shared)}


def test_a_disk_that_is_full_is_said(tmp_path):
    def build(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"--data_cache_dir .*No space left on device, .* GiB are free"):
        cached(tmp_path, "key", build)
    assert not list(tmp_path.glob("key*/"))


def test_a_cached_entry_can_be_read_while_it_is_made_anew(tmp_path, prepare):
    path = write_jsonl(tmp_path / "a.jsonl", [chat(f"q{i}") for i in range(20)])
    before = prepare([path]).train
    assert prepare([path], overwrite_cache=True).train.to_dict() == before.to_dict()
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.suffix] == [f"{prepare([path]).directory.name}.lock"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_other_json(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, replace_by_other_json])
@pytest.mark.parametrize("name", ["tokens.arrow", "rows.npz", "report.json", "rejected.jsonl", "checksums.json"])
def test_a_damaged_entry_is_made_anew(tmp_path, prepare, caplog, name, damage):
    path = write_jsonl(tmp_path / "a.jsonl", [*(chat(f"q{i}") for i in range(20)), {"messages": []}])
    data = prepare([path], data_validation="lenient")
    before, tokens = data.report, data.train.to_dict()
    files = {p.name: p.read_bytes() for p in data.directory.iterdir()}
    damage(data.directory / name)
    again = prepare([path], data_validation="lenient")
    which = "" if (name, damage) == ("checksums.json", flip) else name  # the name of another file may be hit
    assert f"cache entry {data.directory} is damaged ({which}" in caplog.text
    assert again.report == before
    assert again.train.to_dict() == tokens
    same = ("tokens.arrow", "report.json", "rejected.jsonl")
    assert all((again.directory / name).read_bytes() == files[name] for name in same)
    caplog.clear()
    (again.directory / "of_datasets.arrow").touch()
    prepare([path], data_validation="lenient")
    assert caplog.text == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path, prepare):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--data_cache_dir .*file can't be written to"):
        prepare([write_jsonl(tmp_path / "a.jsonl", [chat()])], data_cache_dir=tmp_path / "file")


def test_a_file_that_loses_more_than_a_tenth_of_its_rows_is_warned_of(tmp_path, prepare, chat_format, caplog):
    question = {"role": "user", "content": "Q"}
    empty, silent = {"messages": [question]}, {"messages": [question, {"role": "assistant", "content": " "}]}
    good = [chat(f"q{i}") for i in range(9)]
    tenth = write_jsonl(tmp_path / "tenth.jsonl", [*good, empty])
    more = write_jsonl(tmp_path / "more.jsonl", [*good, silent, empty, silent, *good])
    twice = write_jsonl(tmp_path / "twice.jsonl", [chat("q0")] * 5)
    data = prepare([tenth, more, twice], dedup=True)
    assert report_warnings(data.report) == [
        f"{more}: 3 of 21 rows (14%) are dropped: 2 no_assistant_text, 1 no_assistant_turn; see rejected.jsonl"
    ]
    (tmp_path / "out").mkdir()
    caplog.clear()
    show_data(data, DataConfig([str(tenth)]), chat_format.tokenizer, str(tmp_path / "out"))
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == report_warnings(data.report)
    assert "3 of 21 rows (14%) are dropped" in (tmp_path / "out" / "data_report.html").read_text()


# ---- what is shown ------------------------------------------------------------------------------


def test_show_row_marks_what_is_supervised(tmp_path, prepare, tokenizer, monkeypatch):
    data = prepare([write_jsonl(tmp_path / "a.jsonl", [chat("Why?", "Because.")])])
    shown = show_row(data.samples[0], tokenizer, color=False)
    assert "<|im_start|>assistant\n[[Because.<|im_end|>]]\n" in shown
    assert shown.count("[[") == 1
    assert "\033[32mBecause.<|im_end|>\033[0m" in show_row(data.samples[0], tokenizer, color=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[32m" in show_row(data.samples[0], tokenizer)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[Because." in show_row(data.samples[0], tokenizer)
    data = prepare([write_jsonl(tmp_path / "b.jsonl", [chat("\x1b[2J", "a\tb")])])
    assert "\\x1b[2J<|im_end|>\n" in show_row(data.samples[0], tokenizer, color=False)


def test_show_row_cuts_long_parts_in_the_middle(tmp_path, prepare, tokenizer):
    answer = f"begins {'on and ' * 500}ends"
    data = prepare([write_jsonl(tmp_path / "a.jsonl", [chat("Why?", answer)])], max_length=4096)
    shown = show_row(data.samples[0], tokenizer, color=False)
    assert "[[begins on and " in shown
    assert "on and ends<|im_end|>]]" in shown
    left_out = len(answer + "<|im_end|>") - 2000
    assert f" … {left_out:,} characters … " in shown
    assert len(shown) < 2500


def test_the_page_escapes_what_it_shows(tmp_path, prepare, tokenizer):
    files = [
        write_jsonl(tmp_path / "a<b>.jsonl", [chat("<script>alert(1)</script>", "a & b")]),
        write_jsonl(tmp_path / "b.jsonl", [chat("$table")]),
    ]
    data = prepare(files)
    write_page(data, tokenizer, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>a &amp; b&lt;|im_end|&gt;</b>" in page
    assert "a&lt;b&gt;.jsonl" in page
    assert page.count("<rect") >= 1
