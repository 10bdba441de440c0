"""Names of files in tables: short, and never the same for two files."""

import pytest

from dft.data.channels import file_names
from dft.data.names import MAX_NAME, file_labels
from dft.data.report import report_cells

LONG = "x" * 100


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/math.jsonl", "/elsewhere/code.json"], ["math.jsonl", "code.json"]),
        (["a/train.jsonl", "b/train.jsonl"], ["a/train.jsonl", "b/train.jsonl"]),
        (["x/a/t.json", "y/a/t.json", "t.parquet"], ["x/a/t.json", "y/a/t.json", "t.parquet"]),
        (["/t.json", "/d/t.json", "/d/e/d/t.json"], ["t.json", "d/t.json", "e/d/t.json"]),
        (["a/b/../t.json", "a/b/t.json"], ["a/t.json", "b/t.json"]),
        (["a\nb.json", "a\x1b[1mb.json"], ["a\\nb.json", "a\\x1b[1mb.json"]),
        (["a\x01.json", "a\\x01.json"], ["a\\x01.json", "a\\x01.json (2)"]),
        (["a\x01.json", "a\\x01.json", "a\\x01.json (2)"], ["a\\x01.json", "a\\x01.json (3)", "a\\x01.json (2)"]),
    ],
)
def test_names_are_the_shortest_that_tell_files_apart(paths, names):
    assert file_labels(paths) == names


def test_long_names_lose_their_middle_unless_they_would_be_the_same():
    (name,) = file_labels([f"begin{LONG}end.jsonl"])
    assert len(name) == MAX_NAME
    assert name.startswith("beginx")
    assert name.endswith("xend.jsonl")
    assert "…" in name
    alike = [f"begin{LONG}{middle}{LONG}end.jsonl" for middle in "ab"]
    other = f"other{LONG}end.jsonl"
    names = file_labels([*alike, other])
    assert names[:2] == alike
    assert len(names[2]) == MAX_NAME


def test_a_linked_file_is_called_as_it_was_found_in_tables_and_metrics(tmp_path):
    for name in ("a", "far"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").touch()
    (tmp_path / "b").symlink_to("far")
    paths = [str(tmp_path / name / "train.jsonl") for name in ("a", "b")]
    assert file_labels(paths) == ["a/train.jsonl", "b/train.jsonl"]
    assert file_names(paths) == ["a/train", "b/train"]


@pytest.mark.parametrize(
    "paths",
    [
        ["a/train.jsonl", "b/train.jsonl", "c/d/train.jsonl", "e/d/train.jsonl"],
        [f"{LONG}{i}{LONG}.jsonl" for i in range(9)],
        [f"{LONG}/{i}/{LONG}.jsonl" for i in range(9)],
        [f"a{chr(i)}.json" for i in range(1, 9)],
        ["a.json", "a.jsonl", "a.jsonl.json", "d/a.json", "d/a.jsonl"],
    ],
)
def test_no_two_files_share_a_name(paths):
    assert len(set(file_labels(paths))) == len(paths)
    assert len(set(file_names(paths))) == len(paths)


def test_the_table_tells_files_apart():
    entries = [{"path": f"data/{name}/train.jsonl"} for name in ("a", "b")]
    counts = dict.fromkeys(("rows_read", "kept", "duplicates", "tokens", "supervised_tokens", "truncated"), 1)
    more = {"format": "messages", "rejected": {}, "length_percentiles": {}, "remarks": {}}
    total = {"path": "total", **counts, **more}
    cells = report_cells({"files": [entry | counts | more for entry in entries], "total": total})
    assert [line[0] for line in cells] == ["file", "a/train.jsonl", "b/train.jsonl", "total"]
