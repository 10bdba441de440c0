"""clean: every rule by itself, on rows that keep it and rows that break it."""

import json
import math
import random
from collections import Counter

import pytest

from dft.errors import UserError
from dft.reading.rows import Conversation
from dft.selection import measures
from dft.selection.clean import CleanConfig, clean, clean_rows
from dft.selection.pii import has_luhn_digit, is_iban, mask_json, mask_text
from dft.selection.refusals import refusal
from tests.selection.rows import Writer, conversation


def reasons(rows: list[Conversation], **settings) -> list[str]:
    return [verdict.reason for verdict in clean(CleanConfig(**settings))(iter(rows)).verdicts]


# ---- lengths, repetition, entropy ---------------------------------------------------------------


def test_bounds_are_inclusive():
    rows = [conversation("12345", "6" * n) for n in (4, 5, 10, 11)]
    assert reasons(rows, min_characters=10, max_characters=15) == ["too_short", "", "", "too_long"]
    several = conversation("1", "2")
    several.messages *= 3
    assert reasons([rows[0], several], max_turns=2) == ["", "too_many_turns"]
    assert reasons([rows[0], several], min_turns=2) == ["too_few_turns", ""]
    assert reasons(rows) == [""] * 4  # all rules are off


def test_shares_of_repetition():
    row = conversation("x\nx\nx", "one two three\n\n one two three \nfour\none two three")
    assert measures.repeated_lines(row) == 2 / 4
    assert measures.repeated_ngrams(row, 3) == pytest.approx(1 - 6 / 8)  # one two three, thrice among 8 3-grams
    assert measures.top_ngram(row, 3) == 9 / 10
    assert measures.top_ngram(conversation("x", "only once"), 2) == 0
    assert measures.repeated_lines(conversation("x", "")) == measures.repeated_ngrams(conversation("x", ""), 3) == 0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shares_of_repetition_on_random_words(size):
    rng = random.Random(size)
    for _ in range(50):
        words = rng.choices("a b c d e f g".split(), k=rng.randint(size, 60))
        row = conversation("x", " ".join(words))
        counts = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        assert measures.repeated_ngrams(row, size) == pytest.approx(1 - len(counts) / counts.total())
        top = max(counts.values())
        assert measures.top_ngram(row, size) == pytest.approx(min(1, top * size / len(words)) if top > 1 else 0)


def test_repetition_drops_rows():
    loop = conversation("Say it", "I am here to help you. " * 20)
    prose = conversation("Say it", " ".join(Writer(0).words(120)))
    assert reasons([loop, prose], max_repeated_ngrams=0.3) == ["repeated_ngrams", ""]
    assert reasons([loop, prose], max_top_ngram=0.3) == ["top_ngram", ""]
    lines = conversation("Say it", "same\n" * 9 + "other")
    assert reasons([lines, prose], max_repeated_lines=0.3) == ["repeated_lines", ""]


def test_entropy_is_shannons():
    assert measures.entropy(conversation("", "aaaa")) == pytest.approx(-(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2)))
    same = [conversation("", "\n" * 9), conversation("abc", "defghij\n")]  # 1 of 1, and 12 characters, 11 different
    assert measures.entropy(same[0]) == 0
    assert measures.entropy(same[1]) == pytest.approx(10 / 12 * math.log2(12) + 2 / 12 * math.log2(6))
    assert reasons(same, min_entropy=1, max_entropy=2) == ["low_entropy", "high_entropy"]


def test_a_row_is_dropped_for_the_first_rule_and_counted_for_each():
    decision = clean(CleanConfig(min_characters=10, min_entropy=2))(iter([conversation("a", "a")]))
    assert [verdict.reason for verdict in decision.verdicts] == ["too_short"]
    assert decision.facts["rows_that_break_a_rule"] == {"too_short": 1, "low_entropy": 1}
    assert decision.verdicts[0].score == 2
    assert list(decision.scores["Characters"]) == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_characters": 5, "max_characters": 4}, "--min_characters 5 is above --max_characters 4"),
        ({"min_turns": -1}, "--min_turns is -1"),
        ({"min_entropy": float("nan")}, "--min_entropy is nan"),
        ({"max_top_ngram": 1.1}, "--max_top_ngram is 1.1"),
        ({"ngram": 0}, "--ngram is 0"),
        ({"languages": ("en", "klingon")}, "--languages klingon"),
        ({"pii": "hide"}, "--pii is hide"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        CleanConfig(**settings)


# ---- languages, refusals ------------------------------------------------------------------------


def test_rows_of_other_languages_are_dropped():
    rows = [
        conversation("How many apples does she have left?", "She has four apples left after giving three away."),
        conversation("她还剩下几个苹果？", "给了弟弟三个以后，她还剩下四个苹果。"),
        conversation("Wie viele Äpfel hat sie noch?", "Sie hat noch vier Äpfel, nachdem sie drei verschenkt hat."),
        conversation("2+2", "4"),  # no language
    ]
    assert reasons(rows, languages=("en", "zh")) == ["", "", "language", ""]
    assert reasons(rows, languages=("de",)) == ["language", "language", "", ""]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m really sorry, but as an AI language model, I cannot provide that.",
        "As an AI, I don't have feelings.",
        "**Sorry**, I cannot do this.",
        "I cannot assist with that request.",
        "I apologize, but I am unable to say.",
        "I must respectfully decline.",
        "<think>They ask for a password.</think>\n\nI won't share it.",
        "抱歉，我无法回答这个问题。",
        "作为一个人工智能助手，我不能提供这些信息。",
        "非常抱歉，但我不能协助您。",
        "我无法提供此类信息。",
    ],
)
def test_refusals_are_known_by_their_beginning(answer):
    assert refusal(answer)
    assert not refusal(f"This is how it is said: {answer}")
    assert not refusal(f"答案如下：{answer}")
    assert reasons([conversation("x", answer)], refusals=True) == ["refusal"]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that. Here is what you can do.",
        "Sorry for the late reply! It is 4.",
        "I can't recommend this book enough.",
        "I can't help but smile.",
        "I'm so glad I won't have to.",
        "Unfortunately, the store was closed.",
        "抱歉让您久等了，答案是3。",
        "作为一名老师，我不能迟到。",
        "我不能同意更多。",
        "",
    ],
)
def test_other_answers_are_no_refusals(answer):
    assert refusal(answer) is None


def test_only_the_last_answer_counts():
    row = conversation("x", "I'm sorry, but I can't help with that.")
    row.messages += conversation("Please", "It is 4.").messages
    assert reasons([row], refusals=True) == [""]


# ---- personal data ------------------------------------------------------------------------------

PERSONAL = {  # kind -> texts; keys are put together here, so that nobody takes this file for a leak
    "mail": ["ada@example.org", "first.last+tag@mail.example.co.uk"],
    "card": ["4111 1111 1111 1111", "4111111111111111", "3782 822463 10005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "phone": ["+49 30 123456 78", "(212) 555-0187", "212-555-0187", "13812345678", "138-1234-5678"],
    "api_key": [
        "sk-" + "aB3dE5fG7hJ9kL1mN3pQ",
        "AKIA" + "IOSFODNN7EXAMPLE",
        "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
    ],
    "private_key": ["-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"],
}
NOTHING = [
    "4111 1111 1111 1112",  # Luhn
    "DE89 3704 0044 0532 0130 01",  # modulo 97
    "48/2 = 24 and 1,234,567.89",
    "2023-10-05 12:30:45, version 1.2.3.4",
    "@user and a@b",
    "3.14159265358979323846",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "0x1234567890123456",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_personal_data_is_found_and_masked(kind, text):
    assert mask_text(f"Here: {text}, and more") == (f"Here: [{kind.upper()}], and more", {kind: 1})


@pytest.mark.parametrize("text", NOTHING)
def test_other_numbers_and_words_are_left_alone(text):
    assert mask_text(text) == (text, {})


def test_words_behind_an_iban_are_kept():
    assert mask_text("DE89 3704 0044 0532 0130 00 THIS IS")[0] == "[IBAN] THIS IS"


def test_check_digits():
    """Every change of one digit is noticed, and so is every other last digit."""
    assert has_luhn_digit("79927398713")
    assert sum(has_luhn_digit(f"7992739871{digit}") for digit in range(10)) == 1
    number = "GB82WEST12345698765432"
    assert is_iban(number)
    assert not any(is_iban(number[:8] + str(d) + number[9:]) for d in range(10) if str(d) != number[8])


def test_masking_changes_only_the_strings_that_hold_something():
    """Numbers, keys, escapes and white space stay word for word; JSON in a string stays JSON."""
    inner = json.dumps({"to": "ada@example.org", "13812345678": [13812345678, 1.5e3, -7]})
    start = '{ "ada@example.org": 1.10, "big": 12345678901234567890123, "n": 1e400, "e": "caf\\u00e9\\n",'
    message = '{"role":"user","content":"Mail ada@example.org \\"now\\""}'
    masked, found = mask_json(f'{start} "messages": [{message}], "arguments": {json.dumps(inner)}}}')
    assert found == {"mail": 2, "phone": 1}
    assert masked.startswith(f'{start} "messages": [{{"role":"user","content":')
    value = json.loads(masked)
    assert value["messages"][0]["content"] == 'Mail [MAIL] "now"'
    assert json.loads(value["arguments"]) == {"to": "[MAIL]", "13812345678": ["[PHONE]", 1.5e3, -7]}
    assert mask_json('{"a": "nothing"}') == ('{"a": "nothing"}', {})


@pytest.mark.parametrize(
    ("message", "masked"),
    [
        ("[4111111111111111]", '["[CARD]"]'),
        ('{"phone": 13812345678}', '{"phone": "[PHONE]"}'),
        ('{"a": "{\\"b\\":13812345678}"}', '{"a": "{\\"b\\":\\"[PHONE]\\"}"}'),
        ('{"4111111111111111": 3.14159265358979323846}', None),
        ("[4111111111111112, -5, 1700000000000]", None),
    ],
)
def test_numbers_of_a_message_that_is_json_are_found(message, masked):
    """But not those of the row itself, such as its id."""
    row, found = mask_json(json.dumps({"id": 4111111111111111, "content": message}))
    assert json.loads(row) == {"id": 4111111111111111, "content": masked or message}
    assert found.total() == (masked is not None)


def test_what_is_done_with_personal_data():
    row = conversation("x", "Write to ada@example.org")
    row.row = json.dumps({"messages": row.messages})
    for action, reason, text in (("report", "", None), ("drop", "personal_data", None), ("mask", "", "[MAIL]")):
        decision = clean(CleanConfig(pii=action))(iter([row]))
        verdict = decision.verdicts[0]
        assert verdict.reason == reason
        assert (verdict.text is None) if text is None else text in verdict.text
        assert decision.facts["personal_data"] == {"rows": 1, "found": {"mail": 1}}
        assert "ada" not in json.dumps(decision.tables) + "".join(decision.notes) + verdict.detail


def test_in_a_notebook():
    rows = [conversation("x", "short"), conversation("x", "long enough")]
    kept, dropped = clean_rows(rows, CleanConfig(min_characters=8))
    assert kept == rows[1:]
    assert [(row.reason, row.row) for row in dropped] == [("too_short", rows[0].row)]
    with pytest.raises(UserError, match="rewrites no row"):
        clean_rows(rows, CleanConfig(pii="mask"))
