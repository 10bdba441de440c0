"""Files in, files out: every row is kept word for word or dropped with its reason, and nothing else is touched."""

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_utils import load_conversations
from dft.errors import UserError
from dft.reading.rows import Conversation
from dft.selection.inputs import find_inputs, read_inputs
from dft.selection.method import Decision, Verdict
from dft.selection.outputs import output_names
from dft.selection.run import run
from scripts.select_data import COMMANDS, main, parse
from tests.helpers import ROOT, write_jsonl

ROWS = [
    {"messages": [{"role": "user", "content": f"Question {i} 中文  é"}, {"role": "assistant", "content": "a\n" * i}]}
    for i in range(1, 7)
]
ODD = '{"id": 12345678901234567890123, "x": 1.10, "y": 1e400, "a": 1, "a": 2, "u": "\\u00e9\\u2028", "messages": %s}'


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def report_of(output: Path) -> dict:
    return json.loads((output / "selection_report.json").read_text(encoding="utf-8"))


def select(data: Path, output: Path, *flags: str, command: str = "clean") -> Path:
    main([command, "--data_files", str(data), "--output", str(output), *flags])
    return output


def write_as(kind: str, directory: Path) -> Path:
    path = directory / kind
    if kind == "rows.jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    elif kind == "rows.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "objects.json":
        path.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS), encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS, indent=4 if kind == "pretty.json" else None), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["rows.jsonl.gz", "rows.parquet", "objects.json", "pretty.json", "array.json"])
def test_rows_of_every_format_stay_equal_and_are_read_by_the_trainer(kind, tmp_path):
    data = write_as(kind, tmp_path)
    output = select(data, tmp_path / "out", "--max_characters", "24")
    (kept,) = (output / "kept").iterdir()
    assert [json.loads(line) for line in lines_of(kept)] == ROWS[:4]
    dropped = [json.loads(line) for line in lines_of(output / "dropped.jsonl")]
    assert [json.loads(row["row"]) for row in dropped] == ROWS[4:]
    assert [row["score"] for row in dropped] == [26, 28]
    read, original = list(load_conversations([str(kept)])), list(load_conversations([str(data)]))
    assert all(isinstance(row, Conversation) for row in read)
    assert [row.messages for row in read] == [row.messages for row in original[:4]]


def test_rows_are_kept_word_for_word(tmp_path):
    """Numbers, repeated keys, escapes and spaces are not read and written again."""
    messages = json.dumps(ROWS[0]["messages"], ensure_ascii=False)
    rows = ["  " + ODD % messages, (ODD % messages).replace(", ", " ,\r\t"), ODD % messages + " "]
    data = tmp_path / "rows.jsonl"
    data.write_bytes(("\ufeff" + "\r\n\n".join(rows) + "\n").encode())
    output = select(data, tmp_path / "out")
    assert (output / "kept" / "rows.jsonl").read_bytes() == ("\n".join(rows) + "\n").encode()
    array = tmp_path / "array.json"
    array.write_text("[\n" + ODD.replace(", ", ",\n    ") % messages + "\n]", encoding="utf-8")
    output = select(array, tmp_path / "array")
    assert lines_of(output / "kept" / "array.jsonl") == [ODD % messages]


def test_every_row_is_accounted_for(tmp_path):
    path = tmp_path / "mixed.jsonl"
    bad = ["{broken", '{"messages": []}', json.dumps({"messages": ROWS[0]["messages"][:1]}), "\xff"]
    good = [json.dumps(row) for row in ROWS]
    path.write_bytes("\n".join([*good, *bad]).encode("latin-1"))
    output = select(path, tmp_path / "out", "--max_characters", "24")
    (entry,) = report_of(output)["files"]
    assert entry["dropped"] == {
        "too_long": 2, "broken_json": 1, "malformed_row": 1, "no_assistant_turn": 1, "not_utf8": 1
    }  # fmt: skip
    assert (entry["rows_read"], entry["kept"], entry["rewritten"]) == (10, 4, 0)
    dropped = [json.loads(line) for line in lines_of(output / "dropped.jsonl")]
    assert [row["line"] for row in dropped] == [5, 6, 7, 8, 9, 10]
    assert [row["row"] for row in dropped[:-1]] == good[4:] + bad[:-1]
    assert all(row["path"] == str(path) and row["reason"] and row["detail"] for row in dropped)


def test_the_report_counts_each_file_and_all(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "rows.jsonl", ROWS[: 3 + (name == "b")])
    (tmp_path / "c.jsonl").touch()
    output = select(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", "--max_characters", "22")
    report = report_of(output)
    assert [(file["rows_read"], file["kept"]) for file in report["files"]] == [(3, 3), (4, 3), (1, 0)]
    assert report["total"]["dropped"] == {"too_long": 1, "empty_file": 1}
    outputs = [file["output"] for file in report["files"]]
    assert outputs == ["kept/a-rows.jsonl", "kept/b-rows.jsonl", None]
    assert {f"kept/{path.name}" for path in (output / "kept").iterdir()} == {*filter(None, outputs)}
    assert report["scores"]["Characters"]["count"] == 7
    assert report["settings"]["max_characters"] == 22
    printed = capsys.readouterr().out
    assert "1 too_long" in printed
    assert f"{output}/kept" in printed


def test_names_of_outputs_never_clash():
    paths = ["a/x.jsonl", "a/x.json", "b/x.jsonl.gz", "c/.hidden.jsonl", "d/" + "long" * 60 + ".jsonl", "a-x.jsonl"]
    names = output_names([f"/data/{path}" for path in paths])
    assert len(set(names)) == len(paths)
    assert all(name.endswith(".jsonl") and not name.startswith(".") and len(name) < 80 for name in names)
    assert output_names(["/data/train.jsonl"]) == ["train.jsonl"]


def test_pii_masking_is_the_only_rewriting_and_is_told(tmp_path, capsys):
    rows = [ROWS[0], {"messages": [*ROWS[1]["messages"][:1], {"role": "assistant", "content": "ada@example.org"}]}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    output = select(data, tmp_path / "out", "--pii", "mask")
    kept = lines_of(output / "kept" / "rows.jsonl")
    assert kept[0] == lines_of(data)[0]
    assert json.loads(kept[1])["messages"][1]["content"] == "[MAIL]"
    assert report_of(output)["total"]["rewritten"] == 1
    assert "not word for word" in capsys.readouterr().out


def test_the_page_escapes_what_comes_from_rows(tmp_path):
    rows = [
        *ROWS,
        {"messages": [{"role": "user", "content": "<script>\x1b[31m"}, {"role": "assistant", "content": "&"}]},
    ]
    data = write_jsonl(tmp_path / "<b>.jsonl", rows)
    output = select(data, tmp_path / "out", "--min_characters", "18", "--min_entropy", "0.5")
    page = (output / "selection_report.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<b>.jsonl" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 2


# ---- the output directory -----------------------------------------------------------------------


def test_another_selection_is_replaced_only_on_request(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    output = select(data, tmp_path / "out", command="near-dedup")
    assert (output / "clusters.jsonl").exists()
    with pytest.raises(UserError, match="holds another selection.*--overwrite"):
        select(data, output)
    select(data, output, "--overwrite", "--max_characters", "20")
    assert not (output / "clusters.jsonl").exists()
    assert len(lines_of(output / "kept" / "rows.jsonl")) == 2
    (output / "mine.txt").touch()
    with pytest.raises(UserError, match=r"holds mine.txt, which is not of a selection"):
        select(data, output, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_what_is_read_is_never_overwritten(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"holds .*rows.jsonl, which is read"):
        select(data, tmp_path, "--overwrite")
    output = select(data, tmp_path / "out")
    with pytest.raises(UserError, match="which is read"):
        select(output / "kept", output, "--overwrite")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is a file"):
        select(data, tmp_path / "notes.txt")


def test_files_of_others_are_never_replaced(tmp_path):
    """Not even where they lie among the kept rows, or are read for something else than the selection."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    output = select(data, tmp_path / "out")
    assert report_of(output)["written"] == [
        "dropped.jsonl", "kept", "kept/rows.jsonl", "selection_report.html", "selection_report.json"
    ]  # fmt: skip
    for command, flags in (
        ("contamination", ["--eval_data_files"]),
        ("diversity", ["--model", str(tmp_path), "--num_rows", "1", "--seed_files"]),
    ):
        with pytest.raises(UserError, match=r"holds .*kept/rows\.jsonl, which is read"):
            select(data, output, "--overwrite", *flags, str(output / "kept"), command=command)
    for name in ("kept/mine.jsonl", "kept/notes/a.txt"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).touch()
        with pytest.raises(UserError, match="holds kept/(mine.jsonl|notes).*, which is not of a selection"):
            select(data, output, "--overwrite")
        assert (output / name).exists()
        (output / name).unlink()


def test_an_output_below_a_file_is_refused_before_rows_are_read(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr("dft.selection.run.read_inputs", None)
    with pytest.raises(UserError, match=r"rows\.jsonl is a file, not a directory"):
        select(data, data / "sub")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """Here a file that grows while it is read."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    output = select(data, tmp_path / "out")
    before = (output / "selection_report.json").read_bytes()

    def grow(*_):
        with open(data, "a", encoding="utf-8") as file:
            file.write(json.dumps(ROWS[0]) + "\n")
        return ["rows.jsonl"]

    monkeypatch.setattr("dft.selection.writing.output_names", grow)
    with pytest.raises(UserError, match="has changed while it was read"):
        select(data, output, "--overwrite")
    assert (output / "selection_report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_the_earlier_selection_comes_back_if_the_new_one_cannot_be_published(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    output = select(data, tmp_path / "out")
    before = (output / "selection_report.json").read_bytes()
    rename = os.rename

    def fail(source, target):
        if Path(source).name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(UserError, match="can't be written: No space left on device"):
        select(data, output, "--overwrite", "--min_characters", "20")
    assert (output / "selection_report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_the_progress_bar_ends_at_the_size_of_the_files(tmp_path, capsys):
    files = find_inputs([str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), str(write_as("rows.jsonl.gz", tmp_path))])
    assert len(list(read_inputs(files, "auto", {}, progress=True))) == 2 * len(ROWS)
    assert "Reading: 100%" in capsys.readouterr().err


def test_files_without_a_valid_row_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no row of --data_files can be trained on.*holds no row"):
        select(tmp_path / "empty.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "flags"), [("ifd", []), ("ifd-seed", []), ("diversity", ["--num_rows", "1"])])
def test_commands_that_ask_a_model_say_why_no_row_is_valid(tmp_path, command, flags):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="no row of --data_files can be trained on.*holds no row"):
        select(tmp_path / "empty.jsonl", tmp_path / "out", "--model", str(tmp_path), *flags, command=command)


def test_numbers_that_json_does_not_have_are_written_as_others(tmp_path):
    def refuse(word: str):
        raise AssertionError(word)

    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    args = ["ifd", "--model", str(tmp_path), "--data_files", str(data), "--output", str(tmp_path / "out")]
    args = parse([*args, "--max_ratio", "inf"])
    verdicts = [Verdict("far", score=float(word)) for word in ("inf", "nan", "0.5", "-inf", "1", "2")]
    command = replace(COMMANDS["ifd"], method=lambda _: lambda rows: Decision(verdicts[: len(list(rows))]))
    run(command, args)
    report = (tmp_path / "out" / "selection_report.json").read_text()
    assert json.loads(report, parse_constant=refuse)["settings"]["max_ratio"] == "inf"
    dropped = [json.loads(line, parse_constant=refuse) for line in lines_of(tmp_path / "out" / "dropped.jsonl")]
    assert [row["score"] for row in dropped] == [None, None, 0.5, None, 1.0, 2.0]


def test_a_selection_that_leaves_nothing_says_so(tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    output = select(data, tmp_path / "out", "--min_characters", "1000")
    assert "No row is left" in capsys.readouterr().out
    assert list((output / "kept").iterdir()) == []


# ---- the program --------------------------------------------------------------------------------


def test_contamination_from_files(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": f"{i} one two three four five six seven eight nine ten eleven"},
                          {"role": "assistant", "content": f"twelve {i}"}]} for i in range(3)]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS + rows[:1])
    evaluation = tmp_path / "eval.jsonl"
    rows[0]["messages"].pop()  # a prompt without an answer
    evaluation.write_text("\n".join([*map(json.dumps, rows), "{broken"]), encoding="utf-8")
    output = select(data, tmp_path / "out", "--eval_data_files", str(evaluation), command="contamination")
    (dropped,) = map(json.loads, lines_of(output / "dropped.jsonl"))
    assert (dropped["line"], dropped["reason"], dropped["score"]) == (7, "contaminated", 1.0)
    assert f"{evaluation}:1" in dropped["detail"]
    assert "1 rows of --eval_data_files are malformed" in capsys.readouterr().out
    with pytest.raises(UserError, match="which --data_files names too"):
        select(data, tmp_path / "again", "--eval_data_files", str(data), command="contamination")


def test_mistakes_end_with_status_2_and_without_torch(tmp_path):
    """One process: the modules that are imported, then the program itself."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['select_data.py', 'clean', '--data_files', 'missing.jsonl', '--output', 'out']\n"
        "import scripts.select_data\n"
        "loaded = {'torch', 'transformers', 'datasets', 'rensa', 'py3langid'} & set(sys.modules)\n"
        "print('loaded', sorted(loaded), flush=True)\n"
        "runpy.run_module('scripts.select_data', run_name='__main__')\n"
    )
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert "loaded []" in result.stdout
    assert "error: --data_files:\n  missing.jsonl: no such file" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
