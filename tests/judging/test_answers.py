"""Files of answers: what is read, the places of what can't be, and pairs by prompts."""

import pytest

from dft.errors import UserError
from dft.judging.answers import by_channel, load_answers, pair_answers, repeated_prompts
from tests.helpers import write_jsonl


@pytest.fixture
def load(tmp_path):
    def call(rows: list, name: str = "a.jsonl"):
        return load_answers(write_jsonl(tmp_path / name, rows))

    return call


def row(prompt, answer="yes", **more) -> dict:
    return {"prompt": prompt, "answer": answer, **more}


def test_what_a_row_says(load):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    first, second = load(
        [
            row("2 + 2?", "4", reference=None, source="a", loss=float("1e3")),
            row(messages, " 4\n", reference="four", channel="maths"),
        ]
    )
    assert first.prompt == ({"role": "user", "content": "2 + 2?"},)
    assert (first.answer, first.reference, first.channel, first.line) == ("4", None, "", 1)
    assert second.prompt == tuple(messages)
    assert (second.answer, second.reference, second.channel, second.line) == (" 4\n", "four", "maths", 2)


def test_an_empty_answer_is_an_answer(load):
    assert load([row("2 + 2?", "")])[0].answer == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl:1: the file holds no row"),
        ("{", "a.jsonl:1: broken JSON"),
        ("[1]", "a.jsonl:1: a row must be a JSON object, not the number 1"),
        ('{"answer": "4"}', "a.jsonl:1: no 'prompt' .found 'answer'."),
        ('{"prompt": "2", "Answer": "4"}', "a.jsonl:1: no 'answer' .found 'prompt', 'Answer'."),
        ('{"prompt": "2", "answer": null}', "'answer' must be text, not null"),
        ('{"prompt": "2", "answer": 4}', "'answer' must be text, not the number 4"),
        ('{"prompt": "2", "answer": "4", "reference": ["4"]}', "'reference' must be text, not a list"),
        ('{"prompt": "2", "answer": "4", "channel": 3}', "'channel' must be text"),
        ('{"prompt": " ", "answer": "4"}', "'prompt' is empty"),
        ('{"prompt": [], "answer": "4"}', "'prompt' must be a list of messages"),
        ('{"prompt": 2, "answer": "4"}', "'prompt' must be a list of messages, not the number 2"),
        (
            '{"prompt": [{"role": "sage", "content": "2"}], "answer": "4"}',
            "'prompt' has the role 'sage'; allowed are [^(]*$",
        ),
        ('{"prompt": [{"role": "user"}], "answer": "4"}', "'content' must be text, not null"),
        ('{"prompt": "2", "prompt": "3", "answer": "4"}', "the key 'prompt' stands twice"),
    ],
)
def test_what_can_not_be_judged(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_answers(path)


def test_all_places_are_named_up_to_a_number(load):
    with pytest.raises(UserError) as raised:
        load([row(""), row("2")] + [row("")] * 7)
    lines = str(raised.value).splitlines()
    assert [line.rsplit("/")[-1].split(": ")[0] for line in lines[1:6]] == [f"a.jsonl:{n}" for n in (1, 3, 4, 5, 6)]
    assert lines[6] == "and 3 more"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="none.jsonl can't be read: No such file"):
        load_answers(tmp_path / "none.jsonl")


# ---- pairs --------------------------------------------------------------------------------------


def test_pairs_by_prompts(load):
    """In any order, and whether a prompt is a text or messages; those without a partner are told."""
    a = load([row("1", "a1", channel="x"), row("2", "a2"), row("3", "a3", reference="r")])
    b = load([row("4", "b4"), row([{"content": "3", "role": "user"}], "b3"), row("1", "b1", reference="s")], "b.jsonl")
    pairs, alone = pair_answers(a, b)
    assert [(pair.a.answer, pair.b.answer) for pair in pairs] == [("a1", "b1"), ("a3", "b3")]
    assert [(pair.reference, pair.channel) for pair in pairs] == [("s", "x"), ("r", "")]
    assert [answer.answer for answer in alone] == ["a2", "b4"]


def test_the_case_of_an_order(load):
    """Rejects an order that is only a name."""
    pairs, _ = pair_answers(load([row("1", "a")]), load([row("1", "b")], "b.jsonl"))
    assert pairs[0].case("AB").answers == ("a", "b")
    assert pairs[0].case("BA").answers == ("b", "a")


def test_what_can_not_be_paired(load):
    one = load([row("1")])
    with pytest.raises(UserError, match="a.jsonl:1 and .*a.jsonl:3 have the same prompt"):
        pair_answers(load([row("1"), row("2"), row("1")]), one)
    with pytest.raises(UserError, match="no prompt of .*a.jsonl is in .*b.jsonl"):
        pair_answers(one, load([row("2")], "b.jsonl"))
    with pytest.raises(UserError, match="the same prompt and different references"):
        pair_answers(load([row("1", reference="x")]), load([row("1", reference="y")], "b.jsonl"))


def test_repeated_prompts(load):
    assert repeated_prompts(load([row("1"), row("2"), row("1"), row("1")])) == 2


def test_channels(load):
    answers = load([row("1", channel="x"), row("2"), row("3", channel="x")])
    groups = by_channel(answers, lambda answer: answer.channel)
    assert {name: [a.line for a in group] for name, group in groups.items()} == {"x": [1, 3], "": [2]}
    assert by_channel(load([row("1")]), lambda answer: answer.channel) == {}
