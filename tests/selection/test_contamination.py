"""contamination: planted rows are found, boilerplate isn't taken for one."""

import json
import random

import pytest

from dft.errors import UserError
from dft.selection.contamination import ContaminationConfig, contaminated_rows, contamination
from dft.selection.inputs import find_inputs, read_inputs
from tests.selection.rows import Writer, conversation


def texts(writer: Writer, *counts: int) -> list[str]:
    return [" ".join(writer.words(count)) for count in counts]


def rows_with(writer: Writer, count: int) -> list:
    return [conversation(*texts(writer, 40, 120), line=i + 1) for i in range(count)]


def test_planted_rows_are_found_and_others_kept():
    """Excerpts of 13 words or more, of prompts and of answers, at random places, in other case and punctuation."""
    writer, rng = Writer(0), random.Random(0)
    evaluation = rows_with(writer, 200)
    rows = rows_with(writer, 1000)
    planted = {}
    for number in range(0, 1000, 5):
        source = number // 5
        words = rng.choice(evaluation[source].messages)["content"].split()
        start = rng.randrange(len(words) - 13)
        excerpt = ", ".join(words[start : start + rng.randint(13, 40)]).upper()
        message = rows[number].messages[rng.randrange(2)]
        message["content"] = f"{message['content']} “{excerpt}”. {message['content']}"
        planted[number] = source
    found = {match.row: match.evaluation for match in contaminated_rows(rows, evaluation)}
    assert found == planted


def test_twelve_words_are_no_match_and_thirteen_are():
    writer = Writer(1)
    evaluation = rows_with(writer, 1)
    words = evaluation[0].messages[1]["content"].split()
    for count, expected in ((12, 0), (13, 1)):
        row = conversation(" ".join(writer.words(30)), " ".join(writer.words(20) + words[7 : 7 + count] + ["x"]))
        assert len(contaminated_rows([row], evaluation)) == expected


def test_the_score_is_the_share_of_the_prompt_or_the_answer():
    writer = Writer(2)
    evaluation = rows_with(writer, 3)
    prompt, answer = (message["content"].split() for message in evaluation[1].messages)  # 28 and 108 n-grams
    rows = [conversation(" ".join(prompt[:22]), "no"), conversation("no", " ".join(answer[10:64]))]
    first, second = contaminated_rows(rows, evaluation)
    assert (first.evaluation, first.part, first.shared, first.score) == (1, "prompt", 10, pytest.approx(10 / 28))
    assert (second.evaluation, second.part, second.shared, second.score) == (1, "answer", 42, pytest.approx(42 / 108))
    found = contaminated_rows(rows, evaluation, ContaminationConfig(min_overlap=0.38))
    assert [match.row for match in found] == [1]


def test_boilerplate_of_many_training_rows_flags_none():
    writer = Writer(3)
    boilerplate = " ".join(writer.words(30))
    evaluation = [conversation(f"{text} {boilerplate}", "no") for text in texts(writer, *[60] * 5)]
    rows = [conversation(f"{boilerplate} {text}", "no") for text in texts(writer, *[60] * 40)]
    assert contaminated_rows(rows, evaluation) == []
    assert len(contaminated_rows(rows[:10], evaluation)) == 10  # of few rows it isn't known to be boilerplate
    assert len(contaminated_rows(rows, evaluation, ContaminationConfig(max_rows_per_ngram=40))) == 40


def test_a_prompt_that_many_rows_answer_is_found():
    writer = Writer(4)
    evaluation = rows_with(writer, 5)
    prompt = evaluation[2].messages[0]["content"]
    rows = [conversation(prompt, text) for text in texts(writer, *[50] * 30)]
    found = contaminated_rows(rows, evaluation)
    assert [(match.evaluation, match.part, match.score) for match in found] == [(2, "prompt", 1.0)] * 30
    assert contaminated_rows(rows, evaluation, ContaminationConfig(copied_share=0)) == []


def test_an_answer_that_is_all_boilerplate_is_not_a_copied_prompt():
    writer = Writer(7)
    boilerplate = " ".join(writer.words(20))
    evaluation = [conversation(text, boilerplate) for text in texts(writer, 60, 60)]
    rows = [conversation(text, boilerplate) for text in texts(writer, *[60] * 30)]
    assert contaminated_rows(rows, evaluation) == []
    assert len(contaminated_rows(rows[:5], evaluation)) == 5


def test_short_rows_are_compared_by_eight_words():
    writer = Writer(5)
    short, long = texts(writer, 9, 50)
    evaluation = [conversation(short, "yes"), conversation(long, "no")]
    piece = " ".join(long.split()[5:14])
    rows = [
        conversation(f"{' '.join(writer.words(40))} {short} {' '.join(writer.words(9))}", "ok"),  # a long row
        conversation(piece, "ok"),  # ten words, nine of them of a long evaluation row
        conversation(" ".join(short.split()[:7]), "ok"),
        conversation(f"{' '.join(writer.words(20))} {piece}", "ok"),  # long rows are compared by 13
    ]
    assert [(match.row, match.evaluation) for match in contaminated_rows(rows, evaluation)] == [(0, 0), (1, 1)]


def test_chinese_is_compared_by_characters():
    text = "".join(chr(0x4E00 + 41 * i % 6000) for i in range(80))
    evaluation = [conversation(text[:40], text[40:])]
    rows = [
        conversation("请看：", f"他说：{text[12:25]}。"),
        conversation("请看：", f"他说{text[12:24]}。就是这样，没有别的了"),
    ]
    assert [match.row for match in contaminated_rows(rows, evaluation)] == [0]


def test_the_decision_names_evaluation_rows():
    writer = Writer(6)
    evaluation = rows_with(writer, 3) + [conversation("Hi", "Hello", line=4)]
    rows = rows_with(writer, 4)
    rows[1].messages[0]["content"] += evaluation[2].messages[0]["content"]
    decision = contamination(ContaminationConfig(), evaluation)(iter(rows))
    assert [verdict.reason for verdict in decision.verdicts] == ["", "contaminated", "", ""]
    assert "the prompt of the evaluation row rows.jsonl:3" in decision.verdicts[1].detail
    assert decision.tables["evaluation_rows_found.jsonl"][0]["rows"] == 1
    assert decision.facts["evaluation_rows_too_short"] == 1
    with pytest.raises(UserError, match="1 valid rows, of which 1 have fewer than 8 words"):
        contamination(ContaminationConfig(), evaluation[3:])(iter(rows))


def test_evaluation_rows_need_no_answer(tmp_path):
    """Prompts alone are compared, and only rows that are broken are called malformed."""
    writer = Writer(8)
    prompts = texts(writer, 30, 30)
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    rows[1]["messages"].append({"role": "assistant", "content": ""})
    lines = [*map(json.dumps, rows), "{broken"]

    def method(text: str):
        (tmp_path / "eval.jsonl").write_text(text, encoding="utf-8")
        files = find_inputs([str(tmp_path / "eval.jsonl")], "eval_data_files")
        return contamination(ContaminationConfig(), read_inputs(files, "auto", {}, with_untrainable=True), files)

    training = [conversation(prompt, "yes") for prompt in [*prompts, *texts(writer, 30)]]
    decision = method("\n".join(lines))(iter(training))
    assert [verdict.reason for verdict in decision.verdicts] == ["contaminated", "contaminated", ""]
    assert "1 rows of --eval_data_files are malformed and not compared." in decision.notes
    with pytest.raises(UserError, match=r"0 valid rows, .*, and 1 malformed ones, the first because: .*eval\.jsonl: "):
        method("{broken")(iter(training))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_ngram": 14}, "--short_ngram is 14 and --ngram 13"),
        ({"ngram": 0}, "--ngram 0"),
        ({"min_overlap": -0.1}, "--min_overlap is -0.1"),
        ({"copied_share": float("nan")}, "--copied_share is nan"),
        ({"max_rows_per_ngram": 0}, "--max_rows_per_ngram is 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ContaminationConfig(**settings)
