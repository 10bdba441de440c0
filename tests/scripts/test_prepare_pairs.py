"""scripts/prepare_pairs.py writes pairs of columns as chats, word for word, and refuses rows that are none."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft.errors import UserError
from dft.reading.formats import read_file
from dft.reading.rows import Conversation
from scripts.prepare_pairs import main
from tests.helpers import write_jsonl

# of the kinds of NuminaMath-CoT and GSM8K; other columns may hold anything
NUMINA = [
    {"source": "cn_k12", "problem": "What is $1 + 1$?", "solution": "It is $\\boxed{2}$.", "messages": [{"a": 1}]},
    {"source": "olympiads", "problem": "2 + 2?\n ", "solution": " \u2028\\boxed{4}\u00e9", "messages": []},
    {"source": "cn_k12", "problem": "3 + 3?", "solution": "6", "messages": None},
]
COLUMNS = ["--question", "problem", "--answer", "solution"]


def chats_of(path) -> list[list[tuple[str, str]]]:
    """What the trainer reads in the file; no row is rejected."""
    rows = list(read_file(str(path)))
    assert all(isinstance(row, Conversation) for row in rows)
    return [[(message["role"], message["content"]) for message in row.messages] for row in rows]


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the script on some rows, and returns its output file and what it prints."""

    def run(rows: list, *flags: str):
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        output = tmp_path / "data" / "out.jsonl"
        main([str(path), *COLUMNS, "--output", str(output), *flags])
        return output, capsys.readouterr().out

    return run


def test_texts_are_kept_word_for_word(prepare):
    output, said = prepare(NUMINA)
    assert chats_of(output) == [[("user", row["problem"]), ("assistant", row["solution"])] for row in NUMINA]
    assert said == f"{output}: 3 chats of 1 files\n"


def test_prompts_and_sources_are_added(prepare):
    output, _ = prepare(NUMINA, "--system", "Reason.", "--prompt_suffix", " Box it.", "--channel", "source")
    assert chats_of(output)[0] == [
        ("system", "Reason."),
        ("user", "What is $1 + 1$? Box it."),
        ("assistant", "It is $\\boxed{2}$."),
    ]
    assert [row.channel for row in read_file(str(output))] == ["cn_k12", "olympiads", "cn_k12"]


def test_the_first_rows_of_several_files_are_taken_in_order(tmp_path, capsys):
    """Of Parquet, compressed JSON lines and an array; a broken row behind the limit is not reached."""
    pq.write_table(pa.table({"problem": ["p0", "p1"], "solution": ["s0", "s1"]}), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"problem": "p2", "solution": "s2"}\n')
    (tmp_path / "c.json").write_text(json.dumps([{"problem": "p3", "solution": "s3"}, {"problem": 4}]))
    output = tmp_path / "out" / "pairs.jsonl"
    main([str(tmp_path / "*.*"), *COLUMNS, "--output", str(output), "--limit", "4"])
    assert [chat[0][1] for chat in chats_of(output)] == ["p0", "p1", "p2", "p3"]
    assert capsys.readouterr().out == f"{output}: 4 chats of 3 files\n"


def test_empty_rows_are_left_out_if_that_is_asked_for(prepare):
    rows = [NUMINA[0], {"problem": " \n", "solution": "x"}, {"problem": "x", "solution": ""}]
    with pytest.raises(UserError, match=r"in.jsonl:3: 'solution' is empty\n--skip_empty leaves out"):
        prepare(rows)
    output, said = prepare(rows, "--skip_empty")
    assert len(chats_of(output)) == 1
    assert said.endswith("1 chats of 1 files; 2 were left out because their question or answer is empty\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "a", "answer": "b"}, "in.jsonl:2: no 'solution' (found 'problem', 'answer')"),
        ({"problem": "a", "solution": 7}, "in.jsonl:2: 'solution' must be text, not the number 7"),
        ({"problem": ["a"], "solution": "b"}, "in.jsonl:2: 'problem' must be text, not a list"),
        ([1], "in.jsonl:2: a row must be an object, not a list"),
    ],
)
def test_bad_rows_stop_it_and_leave_nothing(prepare, tmp_path, row, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prepare([NUMINA[0], row])
    assert not list((tmp_path / "data").iterdir())


def test_bad_rows_are_counted_and_the_first_are_named(prepare):
    with pytest.raises(UserError) as caught:
        prepare([NUMINA[0], *[{"problem": "a"}] * 30])
    assert str(caught.value).startswith("30 rows are no pairs:\n")
    assert str(caught.value).count("in.jsonl:") == 20
    assert str(caught.value).endswith("\n  and 10 more")


def test_an_output_is_replaced_only_if_that_is_asked_for(prepare, tmp_path):
    output, _ = prepare(NUMINA)
    with pytest.raises(UserError, match="exists: give another file, or replace it with --overwrite"):
        prepare(NUMINA[:1])
    assert len(chats_of(output)) == 3
    with pytest.raises(UserError, match="no 'solution'"):
        prepare([{"problem": "a"}], "--overwrite")
    assert len(chats_of(output)) == 3  # the whole one stays where the new one fails
    prepare(NUMINA[:1], "--overwrite")
    assert len(chats_of(output)) == 1
    with pytest.raises(UserError, match=r"in.jsonl is read: give another file"):
        prepare(NUMINA, "--output", str(tmp_path / "in.jsonl"), "--overwrite")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--answer", "problem"], "--question and --answer are both problem: name two columns"),
    ],
)
def test_flags_without_sense_are_refused(prepare, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(NUMINA, *flags)


def test_samples_and_missing_files_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", NUMINA)
    output = ["--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(UserError, match="PATH#N is a random sample"):
        main([f"{path}#2", *COLUMNS, *output])
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "none.jsonl"), *COLUMNS, *output])
