"""scripts/evaluate.py --generate: a table, samples and a file of answers, the same on two processes."""

import json
import shutil

import pytest

from dft.errors import UserError
from dft.judging.answers import load_answers
from scripts import evaluate
from tests.answers.lessons import SCORERS
from tests.helpers import run_on


def evaluated(capsys, *words) -> list[str]:
    evaluate.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str]) -> dict[str, list[str]]:
    """The lines of the answers' table by their first word."""
    start = next(i for i, line in enumerate(lines) if line.startswith("answers"))
    return {line.split()[0]: line.split()[1:] for line in lines[start + 1 : start + 6]}


def test_answers_are_shown_and_written(taught, lessons, tmp_path, capsys):
    scores = tmp_path / "scores.json"
    flags = (taught, "--data_files", lessons["right"], "--generate", "--max_new_tokens", 60, "--channels", "field")
    shown = evaluated(capsys, *flags, "--output", scores)
    assert "perplexity" in shown[0]
    found = cells(shown)
    assert found["all"][:3] == ["8", "1.0000", "1.0000"]
    for source, scorer in SCORERS.items():
        assert found[source][:4] == [scorer, "2", "1.0000", "1.0000"]
    assert f"{lessons['right']}:1 (right by exact)" in shown
    assert json.loads(scores.read_text())["answers/tools/tool_call"] == 1.0

    written = tmp_path / "answers.jsonl"
    scorers = ("--answer_scorers", "facts=regex:(.)", "forms=exact", "t*=tool_call")
    shown = evaluated(
        capsys,
        taught,
        "--data_files",
        lessons["wrong"],
        "--generate",
        *scorers,
        "--generations",
        4,
        "--answers",
        written,
    )
    assert cells(shown)["all"][:2] == ["4", "0.0000"]
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(r["channel"], r["scorer"], r["is_right"]) for r in records] == [
        ("facts", "regex:(.)", False),
        ("sums", "last_number", False),
        ("forms", "exact", False),
        ("tools", "tool_call", False),
    ]
    assert (records[0]["answer"], records[0]["reference"]) == ("Paris.", "Madrid.")
    assert records[0]["place"] == f"{lessons['wrong']}:1"
    judged = load_answers(written)  # as scripts/judge.py reads them
    assert judged[0].prompt == ({"role": "user", "content": "Capital of France?"},)
    assert (judged[0].answer, judged[0].reference, judged[0].channel) == ("Paris.", "Madrid.", "facts")


def test_scorers_of_the_training_are_taken_and_may_name_other_sources(taught, lessons, tmp_path, capsys):
    shutil.copytree(taught, tmp_path / "model")
    run = {"answers": {"answer_scorers": ["facts=regex:P", "elsewhere=exact"]}}
    (tmp_path / "model" / "run.json").write_text(json.dumps(run))
    shown = evaluated(capsys, tmp_path / "model", "--data_files", lessons["right"], "--generate")
    assert cells(shown)["facts"][:2] == ["regex:P", "1"]
    assert "1 of the 8 chosen rows can't be asked:" in shown


def test_a_file_whose_rows_all_name_one_source_is_scored_as_that_source(taught, lessons, tmp_path, capsys):
    rows = [row for row in lessons["right"].read_text().splitlines() if json.loads(row)["channel"] == "forms"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    shown = evaluated(
        capsys, taught, "--data_files", tmp_path / "rows.jsonl", "--generate", "--answer_scorers", "forms=exact"
    )
    assert ["forms", "exact", "2"] in [line.split()[:3] for line in shown]


@pytest.mark.launch
def test_two_processes_give_the_same_answers(taught, lessons, tmp_path, capsys):
    written = {count: tmp_path / f"{count}.jsonl" for count in (1, 2)}
    flags = (taught, "--data_files", lessons["right"], "--generate", "--generations", 7)
    evaluated(capsys, *flags, "--answers", written[1])
    run_on(2, "scripts/evaluate.py", *flags, "--answers", written[2], "--generated_at_once", 500)
    assert written[1].read_text() == written[2].read_text()
    assert len(written[1].read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generate", "--answer_scorers", "facts=exactly"], "unknown scorer exactly; did you mean exact"),
        (["--generate", "--answer_scorers", "fact=exact"], "no source is called fact; did you mean facts"),
        (["--generate", "--answer_scorers", "x=exact"], "no source is called x; there are: facts, forms, sums, tools"),
        (["--generate", "--answer_scorers", "*=regex:("], r"\( is no regular expression: missing \)"),
        (["--generate", "--answer_scorers", "exact"], r"exact isn't SOURCE=SCORER; for all sources write '\*=exact'"),
        (["--generate", "--answer_scorers", "a=exact", "a=json"], "names the source a twice"),
        (["--generate", "--generations", "0"], "--generations is 0; it must be at least 1"),
        (["--generate", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be at least 1"),
        (["--generate", "--max_new_tokens", "2048"], "none of the 8 chosen rows can be asked; .*the model takes 0"),
        (["--answers", "a.jsonl"], "--answers is about the model's answers: add --generate"),
        (["--generate", "--answers", "/proc/x/y.jsonl"], "--answers /proc/x/y.jsonl can't be written"),
    ],
)
def test_mistakes_are_the_users(taught, lessons, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([str(taught), "--data_files", str(lessons["right"]), *flags])
