"""scripts/judge.py with transformers' own server and small models: three that know one reply, and a random one."""

import json
import re
from pathlib import Path

import pytest

from dft.errors import StoppedEarly, UserError
from scripts import judge
from tests.conftest import trained_tokenizer
from tests.helpers import write_jsonl
from tests.judging.serving import make_judge, served

pytestmark = pytest.mark.launch  # of the server

NAMES = ("helpful", "honest", "harmless", "follows_instruction")
SCORES = json.dumps({"reason": "Fine.", "scores": dict(zip(NAMES, (4, 5, 5, 3), strict=True))})
FIRST = json.dumps({"reason": "Fine.", "verdicts": dict.fromkeys(NAMES, "first")})
ROWS = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n), "reference": str(2 * n)} for n in range(1, 5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory of judges: one that scores, one that prefers what comes first, one that chats, and a random one."""
    directory = tmp_path_factory.mktemp("judges")
    for name, reply in (("scores", SCORES), ("first", FIRST), ("chat", "I like it."), ("random", None)):
        make_judge(directory / name, trained_tokenizer(), reply)
    return directory


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server") / "server.log") as url:
        yield url


@pytest.fixture
def ask(url, models, tmp_path):
    """Runs a command of the script with a model of the server."""

    def call(command: str, model: str, *files: list, flags=()) -> None:
        paths = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in zip("ab", files, strict=False)]
        own = ("--endpoint", url, "--model", models / model, "--max_retries", 0)
        judge.main([command, *map(str, paths), *map(str, own), *map(str, flags)])

    return call


def test_scores(ask, tmp_path, capsys):
    report = tmp_path / "report.json"
    ask("score", "scores", ROWS, flags=("--report", report, "--price_in", 1, "--price_out", 1))
    numbers = json.loads(report.read_text())
    assert {name: entry["value"] for name, entry in numbers["scores"].items()} == {
        **dict(zip(NAMES, (4, 5, 5, 3), strict=True)),
        "total": 4.25,
    }
    requests = numbers["requests"]
    assert (requests["made"], requests["failed"], requests["completion_tokens"]) == (12, {}, 24)
    assert requests["prompt_tokens"] > 12 * 500  # the rubric's
    assert requests["price"] == pytest.approx((requests["prompt_tokens"] + 24) / 1e6)
    assert "4 of 4 rows have scores" in capsys.readouterr().out


def test_a_comparison_by_a_judge_of_the_place(ask, capsys):
    """It prefers the first answer in every request, so both models are as good."""
    ask("compare", "first", ROWS, [{**row, "answer": "I can't say."} for row in ROWS], flags=("--votes", 1))
    text = capsys.readouterr().out
    assert re.search(r"overall +0 +4 +0 +50\.0%", text)
    assert "8 are for the first and 0 for the second (100%; without a bias 50%)" in text


@pytest.mark.parametrize(
    ("model", "failure"), [("chat", r"8 not_json, the first: broken JSON.*I like it\."), ("random", "cut_off")]
)
def test_replies_that_can_not_be_read_are_failures(ask, capsys, model, failure):
    with pytest.raises(StoppedEarly, match="100.0% of the requests failed") as raised:
        ask("score", model, ROWS, flags=("--votes", 2, "--max_tokens", 8))
    assert raised.value.status == 1
    text = capsys.readouterr().out
    assert "none of 4 rows has scores" in text
    assert "8 requests failed" in text
    assert re.search(failure, text)


def test_a_request_that_the_server_fails_at(ask, capsys):
    """The template of the models refuses one row; the others are scored."""
    rows = [*ROWS, {"prompt": "THIS BREAKS THE TEMPLATE", "answer": "?"}]
    ask("score", "scores", rows, flags=("--votes", 1, "--max_failed", 0.5))
    text = capsys.readouterr().out
    assert "4 of 5 rows have scores" in text
    assert "1 http_500, the first: " in text
    assert re.search(r"without: .*a.jsonl:5", text)


@pytest.mark.parametrize(
    ("flags", "reason"), [(["--model", "no/such-model"], "http_500"), (["--request", '{"colour": 1}'], "http_422")]
)
def test_what_the_server_does_not_know_is_told_before_anything_is_asked(ask, capsys, flags, reason):
    with pytest.raises(UserError, match=f"gives no reply of the model .*{reason}"):
        ask("score", "scores", ROWS, flags=flags)
    assert capsys.readouterr().out == ""
