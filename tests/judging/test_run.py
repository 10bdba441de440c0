"""scripts/judge.py with a server over HTTP: what is asked, what is kept, what is printed, and the status."""

import json
import re

import pytest

from dft.errors import StoppedEarly, UserError
from dft.judging.endpoint import PROBE
from scripts import judge
from tests.helpers import ROOT, run, write_jsonl
from tests.judging.protocol import ProtocolServer, completion

NAMES = ("helpful", "honest", "harmless", "follows_instruction")
ROWS = [
    {"prompt": f"{n} + {n}?", "answer": f"It is {2 * n}.", "reference": str(2 * n), "channel": ("even", "odd")[n % 2]}
    for n in range(1, 7)
]


def scores(score: int, **others: int) -> str:
    return json.dumps({"reason": "so", "scores": {name: others.get(name, score) for name in NAMES}})


def asked_answers(server: ProtocolServer) -> list[str]:
    """The answers that the server was asked about, without the probe."""
    texts = [body["messages"][-1]["content"] for _, _, body in server.requests if body["messages"] != PROBE]
    return [re.search(r"<answer-\w+>\n(.*)\n", text)[1] for text in texts]


def score(server, tmp_path, *flags, rows=ROWS) -> None:
    path = write_jsonl(tmp_path / "answers.jsonl", rows)
    own = ("--endpoint", server.url, "--model", "m", "--max_retries", "0")
    judge.main(["score", str(path), *own, *map(str, flags)])


def test_scores_of_a_file(server, tmp_path, capsys):
    """By channel, with the tokens and the price of 19 requests, the probe not counted."""
    server.reply = lambda body: (200, completion(scores(4, harmless=5) if "It is 2." in str(body) else scores(2)))
    report = tmp_path / "report.json"
    score(server, tmp_path, "--report", report, "--price_in", 100, "--price_out", 1000)
    numbers = json.loads(report.read_text())
    assert numbers["scores"]["helpful"]["value"] == pytest.approx((4 + 5 * 2) / 6)
    assert numbers["scores"]["harmless"]["value"] == pytest.approx((5 + 5 * 2) / 6)
    assert numbers["channels"]["even"]["scores"]["total"]["value"] == 2.0
    assert numbers["requests"] == {
        "made": 18, "failed": {}, "prompt_tokens": 180, "completion_tokens": 90, "replies_without_token_counts": 0,
        "price": pytest.approx(0.018 + 0.09),
    }  # fmt: skip
    assert sorted(asked_answers(server)) == sorted(row["answer"] for row in ROWS for _ in range(3))
    seeds = {body["seed"] for _, _, body in server.requests}
    assert seeds == {0, 1, 2}
    output = capsys.readouterr().out
    assert re.search(r"total +2\.38 +\d\.\d\d to \d\.\d\d", output)
    assert "18 requests, 180 prompt tokens, 90 completion tokens, price 0.1080" in output


def test_judged_rows_are_not_asked_again(server, tmp_path, capsys):
    """A changed answer is, and so are rows that too few votes were valid of; another judge is asked all."""
    output = tmp_path / "judged.jsonl"
    server.reply = lambda body: (200, completion("?" if "It is 4." in str(body) else scores(3)))
    score(server, tmp_path, "--output", output, "--max_failed", 1)
    first = capsys.readouterr().out
    assert "5 of 6 rows have scores" in first
    assert "3 not_json, the first: broken JSON" in first
    assert len(output.read_text().splitlines()) == 6
    server.reply = lambda body: (200, completion(scores(3)))
    server.requests.clear()
    rows = [{**ROWS[0], "answer": "I can't say."}, *ROWS[1:]]
    score(server, tmp_path, "--output", output, rows=rows)
    assert sorted(set(asked_answers(server))) == ["I can't say.", "It is 4."]
    assert "6 of 6 rows have scores" in capsys.readouterr().out
    server.requests.clear()
    score(server, tmp_path, "--output", output, rows=rows)
    assert server.requests == []  # nor a probe
    assert "nothing had to be asked" in capsys.readouterr().out
    score(server, tmp_path, "--output", output, "--model", "another", rows=rows)
    assert len(asked_answers(server)) == 18


def test_the_same_row_twice_is_asked_once(server, tmp_path, capsys):
    server.reply = lambda body: (200, completion(scores(3)))
    score(server, tmp_path, "--votes", 1, rows=[ROWS[0], ROWS[0]])
    assert len(asked_answers(server)) == 1
    output = capsys.readouterr()
    assert "2 of 2 rows have scores" in output.out
    assert "1 rows have the prompt of an earlier row" in output.err


def test_too_many_failures_are_the_status_1(server, tmp_path, capsys):
    server.reply = lambda body: (200, completion("no" if body["seed"] == 2 else scores(3)))
    with pytest.raises(StoppedEarly, match=r"33.3% of the requests failed, more than --max_failed 0.1") as raised:
        score(server, tmp_path)
    assert raised.value.status == 1
    assert "6 of 6 rows have scores" in capsys.readouterr().out
    score(server, tmp_path, "--max_failed", 0.34)


def test_a_server_that_goes_away(server, tmp_path, capsys):
    """What was judged before stays, and the same command goes on from there."""
    rows = [{"prompt": str(n), "answer": f"It is {n}."} for n in range(20)]
    output = tmp_path / "judged.jsonl"
    count = iter(range(1000))
    server.reply = lambda body: (200, completion(scores(3))) if next(count) < 7 else (503, {"error": "gone"})
    with pytest.raises(StoppedEarly, match="20 requests had no reply .http_503.*judged.jsonl, and the same") as raised:
        score(server, tmp_path, "--output", output, "--workers", 1, rows=rows)
    assert raised.value.status == 1
    assert "http_503" in str(raised.value)
    server.requests.clear()
    server.reply = lambda body: (200, completion(scores(3)))
    score(server, tmp_path, "--output", output, rows=rows)
    assert {"It is 0.", "It is 1."}.isdisjoint(asked_answers(server))
    text = capsys.readouterr().out
    assert "20 of 20 rows have scores" in text
    assert "54 requests" in text


def test_replies_without_counts_of_tokens_are_told(server, tmp_path, capsys):
    server.reply = lambda body: (200, completion(scores(3), usage=None))
    score(server, tmp_path)
    assert "18 replies came without counts of tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_failed", 2], "--max_failed is 2; it must be a share from 0 to 1"),
        (["--price_in", 2], "--price_in and --price_out must be given together"),
        (["--price_in", 2, "--price_out", -1], "be at least 0"),
        (["--votes", 0], "--votes and --workers must be at least 1"),
        (["--rubric", "no.yaml"], "--rubric no.yaml can't be read"),
        (["--output", "/proc/x/y.jsonl"], "--output /proc/x/y.jsonl can't be written"),
        (["--report", "/proc/x/y.json"], "--report /proc/x/y.json can't be written"),
        (["--endpoint", "http://127.0.0.1:1/v1"], "gives no reply of the model m .no_connection"),
        (["--endpoint", "nowhere"], "--endpoint or OPENAI_BASE_URL is nowhere"),
        (["--request", '{"n": 2}'], "--request can't set 'n'"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(server, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        score(server, tmp_path, *flags)
    assert server.requests == []


def test_no_file_that_is_read_is_replaced(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    for flags, message in ((("--report", path), "is read"), (("--output", path), ":1 isn't a line that a judge")):
        with pytest.raises(UserError, match=message):
            score(server, tmp_path, *flags)
    assert len(path.read_text().splitlines()) == 6
    with pytest.raises(UserError, match="or is the --output"):
        score(server, tmp_path, "--output", tmp_path / "x", "--report", tmp_path / "x")


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_request_fields_are_an_object(server, tmp_path, text):
    with pytest.raises(SystemExit) as raised:
        score(server, tmp_path, "--request", text)
    assert raised.value.code == 2


def test_the_program_has_the_status_and_no_key(server, tmp_path):
    path = write_jsonl(tmp_path / "answers.jsonl", ROWS[:1])
    server.reply = lambda body: (401, {"error": {"message": "who is sk-secret?"}})
    command = ["python", ROOT / "scripts" / "judge.py", "score", path, "--model", "m", "--endpoint", server.url]
    result = run(command, OPENAI_API_KEY="sk-secret", NO_PROXY="127.0.0.1")
    assert result.returncode == 2
    assert result.stdout.startswith("error: ")
    assert "who is HIDDEN?" in result.stdout
    assert "secret" not in result.stdout
    assert len(result.stdout.splitlines()) == 1
    server.reply = lambda body: (200, completion("no" if body["messages"] != PROBE else "yes"))
    result = run([*command, "--votes", 1], NO_PROXY="127.0.0.1")
    assert result.returncode == 1
    assert "100.0% of the requests failed" in result.stdout


# ---- compare ------------------------------------------------------------------------------------


def verdicts(verdict: str) -> str:
    return json.dumps({"verdicts": dict.fromkeys(NAMES, verdict)})


def compared(body: dict) -> tuple[str, str]:
    """The two answers that a request shows, in their order."""
    text = body["messages"][-1]["content"]
    return tuple(re.search(rf"<{place}-answer-\w+>\n(.*)\n", text)[1] for place in ("first", "second"))


def compare(server, tmp_path, *flags, a=ROWS, b=ROWS) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", a), ("b", b))]
    own = ("--endpoint", server.url, "--model", "m", "--max_retries", "0")
    judge.main(["compare", *map(str, paths), *own, *map(str, flags)])


def test_a_judge_of_the_answers(server, tmp_path, capsys):
    """It prefers the longer answer, wherever it stands: A wins 3 of 5, B 1, and one has the same answer twice."""

    def reply(body):
        if body["messages"] == PROBE:
            return 200, completion("yes")
        first, second = compared(body)
        return 200, completion(verdicts("first" if len(first) > len(second) else "second"))

    server.reply = reply
    longer = [{**row, "answer": row["answer"] + " Yes."} for row in ROWS]
    a, b = [*longer[:3], *ROWS[3:5]], [*ROWS[:3], longer[3], ROWS[4], ROWS[5]]
    output, report = tmp_path / "judged.jsonl", tmp_path / "report.json"
    compare(server, tmp_path, "--output", output, "--report", report, a=a, b=b)
    numbers = json.loads(report.read_text())
    overall = numbers["results"]["overall"]
    assert (overall["wins"], overall["ties"], overall["losses"], overall["value"]) == (3, 1, 1, 0.7)
    assert numbers["verdicts_by_place"] == {"first": 12, "tie": 0, "second": 12}
    assert numbers["requests"]["made"] == 4 * 2 * 3
    text = capsys.readouterr().out
    assert re.search(r"overall +3 +1 +1 +70\.0% +\d\d\.\d% to \d\d\.\d%", text)
    assert f"1 without a partner: {tmp_path}/b.jsonl:6" in text
    assert {json.loads(line)["verdicts"]["helpful"] for line in output.read_text().splitlines()} == {"A", "B"}
    server.requests.clear()
    compare(server, tmp_path, "--output", output, a=a, b=b)
    assert server.requests == []
    compare(server, tmp_path, "--output", output, a=b, b=a)
    assert re.search(r"overall +1 +1 +3 +30\.0%", capsys.readouterr().out)


def test_a_judge_of_the_place(server, tmp_path, capsys):
    """Its verdicts are ties, and the bias is told. Rejects an order that isn't undone, by which A would win all."""
    server.reply = lambda body: (200, completion(verdicts("first")))
    compare(server, tmp_path, b=[{**row, "answer": "No."} for row in ROWS])
    text = capsys.readouterr().out
    assert re.search(r"overall +0 +6 +0 +50\.0%", text)
    assert "6 on which the two orders disagree" in text
    assert "36 are for the first and 0 for the second (100%; without a bias 50%)" in text
    assert re.search(r"(?m)^even +0 +3 +0 +50\.0%", text)


def test_answers_that_can_not_be_paired(server, tmp_path):
    with pytest.raises(UserError, match="no prompt of .*a.jsonl is in .*b.jsonl"):
        compare(server, tmp_path, a=ROWS[:2], b=ROWS[2:])
    with pytest.raises(UserError, match="a.jsonl:1 and .*a.jsonl:2 have the same prompt"):
        compare(server, tmp_path, a=[ROWS[0], ROWS[0]])
    assert server.requests == []


def test_failed_comparisons_have_no_verdict(server, tmp_path, capsys):
    """Two of three votes of one order fail."""

    def reply(body):
        fails = body["messages"] != PROBE and compared(body)[0] == "No." and body["seed"] > 0
        return 200, completion("hm" if fails else verdicts("tie"))

    server.reply = reply
    compare(server, tmp_path, "--max_failed", 0.5, b=[{**row, "answer": "No."} for row in ROWS])
    text = capsys.readouterr().out
    assert "none of 6 pairs has a verdict" in text
    assert "12 requests failed (33.3%):" in text
