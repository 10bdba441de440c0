"""Scorers by cases, each of which a simpler scorer gets wrong."""

import contextlib
import json
import re

import pytest

from dft.answers import scorers
from dft.answers.calls import calls_of
from dft.answers.scorers import choose_scorer, make_scorer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n</tool_call>'
RIGHT = [  # (scorer, answer, reference)
    ("exact", " Paris\n is  big. ", "Paris is big."),
    ("exact", "<think>\nFrance?\n</think>\n\nParis", "Paris"),
    ("last_number", "First 3, then 4: so 12.", "#### 12"),
    ("last_number", "It is \\boxed{1,234.50}", "1234.5"),
    ("last_number", "= -7", "The result is \u22127 degrees."),
    ("last_number", "\\frac{1}{2}", "0.5"),
    ("last_number", "3/4 of them", "\\boxed{\\dfrac{75}{100}}"),
    ("last_number", ".5", "0.50"),
    ("last_number", "10-5", "5"),
    ("last_number", "1, 2, 3", "3"),
    ("regex:answer is (\\w)", "I think the answer is B.", "The answer is B, of course"),
    ("regex:\\b[A-D]\\b", "B, not C", "B"),
    ("json", '{"b": [1, 2.0], "a": null}', '{"a": null, "b": [1.0, 2]}'),
    ("json", '```json\n{"a": 1}\n```', '{"a": 1}'),
    ("json", "[]", "some text"),
    ("json", "null", "null"),
    ("tool_call", '<tool_call>{"arguments": {"days": 2, "city": "Bonn"}, "name": "weather"}</tool_call>', CALL),
    ("tool_call", 'I look. {"name": "weather", "parameters": {"city": "Bonn", "days": 2.0}}', CALL),
    ("tool_call", '[TOOL_CALLS][{"name": "weather", "arguments": "{\\"city\\": \\"Bonn\\", \\"days\\": 2}"}]', CALL),
    ("tool_call", CALL + CALL, CALL + "\n" + CALL),
    ("tool_call", 'The set {"a": 1} is no call.', "It is sunny."),
]
WRONG = [
    ("exact", "paris", "Paris"),
    ("exact", "Paris is", "Paris is big."),
    ("exact", "<think>Paris", "Paris"),
    ("last_number", "12 apples and 3 pears", "12"),
    ("last_number", "No number.", "12"),
    ("last_number", "7", "-7"),
    ("last_number", "1,234", "234"),
    ("last_number", "1.5", "15"),
    ("last_number", "<think>It must be 12", "12"),
    ("last_number", "9" * 5000, "9"),
    ("regex:answer is (\\w)", "The answer is C", "The answer is B"),
    ("regex:answer is (\\w)", "B", "The answer is B"),
    ("json", '{"a": 1', "some text"),
    ("json", '{"a": 1, "a": 2}', "some text"),
    ("json", '{"a": NaN}', "some text"),
    ("json", '{"a": true}', '{"a": 1}'),
    ("json", "[1, 2]", "[2, 1]"),
    ("json", '{"a": 1, "b": 2}', '{"a": 1}'),
    ("tool_call", CALL.replace("Bonn", "Rome"), CALL),
    ("tool_call", CALL.replace("weather", "time"), CALL),
    ("tool_call", CALL.replace("2", '"2"'), CALL),
    ("tool_call", CALL + CALL, CALL),
    ("tool_call", "It is sunny.", CALL),
    ("tool_call", CALL, "It is sunny."),
    ("tool_call", CALL[:-20], CALL),
    ("tool_call", "<think>" + CALL, CALL),
    ("tool_call", "[" * 5_000 + "{" * 5_000, CALL),
]


def verdicts() -> list[bool]:
    return [make_scorer(name).is_right(answer, reference) for name, answer, reference in RIGHT + WRONG]


EXPECTED = [True] * len(RIGHT) + [False] * len(WRONG)


@pytest.mark.parametrize(("name", "answer", "reference"), RIGHT)
def test_right(name, answer, reference):
    assert make_scorer(name).can_score(reference)
    assert make_scorer(name).is_right(answer, reference)


@pytest.mark.parametrize(("name", "answer", "reference"), WRONG)
def test_wrong(name, answer, reference):
    assert not make_scorer(name).is_right(answer, reference)


def first_number(text):
    found = re.search(r"\d+", text)
    return found and found[0]


@pytest.mark.parametrize(
    ("place", "name", "mutant"),
    [
        (scorers.READERS, "last_number", first_number),
        (scorers.READERS, "json", lambda text: text),  # compared as texts
        (scorers.READERS, "json", lambda text: (json.loads(text),) if text[:1] in "{[" else None),
        (scorers.READERS, "exact", str.strip),
        (vars(scorers), "same_value", lambda one, other: one == other),
        (vars(scorers), "final_text", str.strip),
    ],
)
def test_the_cases_reject(place, name, mutant, monkeypatch):
    assert verdicts() == EXPECTED
    monkeypatch.setitem(place, name, mutant)
    with contextlib.suppress(ValueError):
        assert verdicts() != EXPECTED


def test_a_reference_that_nothing_could_equal_can_not_be_scored():
    assert not make_scorer("last_number").can_score("no number")
    assert not make_scorer("regex:is (\\d)").can_score("no match")
    assert not make_scorer("regex:is (\\d)").is_right("no match", "no match")


@pytest.mark.parametrize(
    ("reference", "has_calls", "expected"),
    [
        (CALL, True, "tool_call"),
        (CALL, False, "exact"),
        ('{"city": "Bonn"}', False, "json"),
        ("```json\n[1, 2]\n```", False, "json"),
        ("42", False, "last_number"),
        ("2 x 3 = 6.", False, "last_number"),
        ("It is **42%**", False, "last_number"),
        ("3 + 4 = 7\n#### 7 apples", False, "last_number"),
        ("So \\boxed{x + 1} it is", False, "last_number"),
        ("There are 12 months in a year.", False, "exact"),
        ("The capital of France is Paris.", False, "exact"),
        ("<think>\n2 + 2 = 4\n</think>\n\nFour", False, "exact"),
        ("", False, "exact"),
    ],
)
def test_auto_tells_the_scorer_by_the_reference(reference, has_calls, expected):
    assert choose_scorer(reference, has_calls) == expected


def test_the_calls_of_a_message_in_every_form():
    expected = [("f", {"x": 1}), ("g", {})]
    written = [{"function": {"name": "f", "arguments": {"x": 1}}}, {"name": "g"}]
    assert calls_of({"tool_calls": written}) == expected
    assert calls_of({"tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}) == expected[:1]
    assert calls_of({"content": "no call"}) == []
