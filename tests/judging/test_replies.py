"""Replies of a judge: what counts, and what is a failure with a reason."""

import json

import pytest

from dft.judging.replies import ReplyError, parse_scores, parse_verdicts

GOOD = '{"reason": "fine", "scores": {"right": 4, "brief": 2}}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n {GOOD} \n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}```",
        f"<think>\nHere {{}} and ```\n</think>\n\n{GOOD}",
        json.dumps(json.loads(GOOD), indent=1),
    ],
)
def test_scores(rubric, text):
    assert parse_scores(text, rubric) == ({"right": 4, "brief": 2}, "fine")


def test_a_reason_may_be_missing(rubric):
    assert parse_scores('{"scores": {"brief": 1, "right": 5}}', rubric) == ({"right": 5, "brief": 1}, "")


@pytest.mark.parametrize(
    ("text", "reason", "detail"),
    [
        ("", "empty", "no text"),
        ("``````", "not_json", "broken JSON"),
        ("<think>so</think>", "empty", "no text"),
        ("The answer deserves a 4.", "not_json", "broken JSON"),
        (f"Here you are: {GOOD}", "not_json", "broken JSON"),
        (GOOD + GOOD, "not_json", "broken JSON"),
        (GOOD[:-1], "not_json", "broken JSON"),
        (GOOD.replace("4", "NaN"), "not_json", "NaN and Infinity are not JSON"),
        (GOOD.replace("brief", "right"), "not_json", "'right' stands twice"),
        ("[" * 9000, "not_json", "nested too deeply"),
        ("[4, 2]", "wrong_form", "isn't an object with the object scores"),
        ('{"right": 4, "brief": 2}', "wrong_form", "isn't an object with the object scores"),
        ('{"scores": {"right": 4}}', "wrong_form", "scores has the keys right; they must be right, brief"),
        ('{"scores": {}}', "wrong_form", r"scores has the keys \(none\)"),
        (GOOD.replace("2}", '2, "kind": 3}'), "wrong_form", "scores has the keys right, brief, kind"),
        (GOOD.replace("4", "6"), "wrong_value", "right is the number 6; it must be a whole number from 1 to 5"),
        (GOOD.replace("4", "0"), "wrong_value", "right is the number 0"),
        (GOOD.replace("4", "3.5"), "wrong_value", "right is the number 3.5"),
        (GOOD.replace("4", '"4"'), "wrong_value", "right is text"),
        (GOOD.replace("4", "true"), "wrong_value", "right is true or false"),
        (GOOD.replace("4", "null"), "wrong_value", "right is null"),
    ],
)
def test_what_is_no_score(rubric, text, reason, detail):
    """Rejects a parser that searches for a number, that rounds, and that takes true for 1."""
    with pytest.raises(ReplyError, match=detail) as raised:
        parse_scores(text, rubric)
    assert raised.value.reason == reason


def test_verdicts(rubric):
    text = '{"verdicts": {"brief": "tie", "right": "second"}, "reason": 3}'
    assert parse_verdicts(text, rubric) == ({"right": "second", "brief": "tie"}, "")


@pytest.mark.parametrize("value", ["A", "First", "", 1, None, ["first"]])
def test_what_is_no_verdict(rubric, value):
    text = json.dumps({"verdicts": {"right": value, "brief": "tie"}})
    with pytest.raises(ReplyError, match="right is .*; it must be first, second or tie"):
        parse_verdicts(text, rubric)
