"""Rubrics: what a file says, and the one message that a mistake gets."""

import pytest

from dft.errors import UserError
from dft.judging.rubric import Criterion, Rubric, load_rubric

SCALE = "{1: a, 2: b, 3: c, 4: d, 5: e}"
GOOD = f"criteria:\n- name: brief\n  weight: 0.5\n  question: Is it\n    brief?\n  scale: {SCALE}\n"


@pytest.fixture
def load(tmp_path):
    def call(text: str) -> Rubric:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_rubric(path)

    return call


def test_the_default_has_the_four_criteria():
    rubric = load_rubric(None)
    assert rubric.names == ("helpful", "honest", "harmless", "follows_instruction")
    assert all(len(set(criterion.scale)) == 5 for criterion in rubric.criteria)


def test_what_a_file_says(load):
    assert load(GOOD).criteria == (Criterion("brief", 0.5, "Is it brief?", ("a", "b", "c", "d", "e")),)


def test_the_weighted_mean():
    """Rejects a plain mean, and a sum that isn't divided by the weights."""
    criteria = [Criterion(name, weight, "?", ("",) * 5) for name, weight in (("a", 3.0), ("b", 1.0))]
    assert Rubric(tuple(criteria)).weighted({"a": 5, "b": 1}) == 4.0


def test_the_digest_follows_every_part(load):
    texts = [GOOD, GOOD.replace("0.5", "1"), GOOD.replace("Is it", "Is this"), GOOD.replace("5: e", "5: f")]
    assert len({load(text).digest for text in texts}) == 4
    assert load(GOOD).digest == load("# a remark\n" + GOOD).digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (GOOD, "", "holds no rubric"),
        (GOOD, "- a", "holds no rubric"),
        (GOOD, "criteria: []", "holds no criteria"),
        (GOOD, "criteria: [a]", "mine.yaml:1: a criterion must be a mapping with name, weight, question, scale"),
        (GOOD, "criteria: [", "--rubric .*mine.yaml can't be read"),
        ("criteria:", "criterias:", "mine.yaml:2: unknown key criterias; did you mean criteria?"),
        ("weight:", "wieght:", "mine.yaml:3: unknown key wieght; did you mean weight?"),
        ("  weight: 0.5\n", "", "mine.yaml:2: the criterion lacks the key weight"),
        ("0.5", "0", "mine.yaml:3: weight is 0; it must be a number above 0"),
        ("0.5", "-1", "weight is -1"),
        ("0.5", ".nan", "weight is .nan"),
        ("0.5", "nan", "weight is nan"),
        ("0.5", "inf", "weight is inf"),
        ("0.5", "", "weight is empty"),
        ("name: brief", "name: Very brief", "mine.yaml:2: name is Very brief"),
        ("name: brief", "name: total", "not be total or overall"),
        (", 5: e", "", "mine.yaml:6: scale has the keys 1, 2, 3, 4; it must be a mapping of each whole number"),
        ("5: e", "6: e", "scale has the keys 1, 2, 3, 4, 6"),
        (SCALE, "5", "mine.yaml:6: scale isn't a mapping"),
        ("5: e", "5: ''", "mine.yaml:6: scale, 5 is empty"),
        ("Is it\n    brief?", "[1]", "mine.yaml:4: question is empty or no text"),
        (GOOD, GOOD + GOOD.removeprefix("criteria:\n"), "mine.yaml:7: two criteria are called brief"),
        ("  weight: 0.5\n", "  weight: 0.5\n  weight: 1\n", "mine.yaml:4: weight is given twice"),
    ],
)
def test_mistakes_name_the_file_and_the_key(load, old, new, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load(GOOD.replace(old, new))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--rubric .*none.yaml can't be read.*No such file"):
        load_rubric(tmp_path / "none.yaml")
