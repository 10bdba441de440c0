"""Tokens and shingles, compared with a plain reference."""

import random
import unicodedata

import pytest

from dft.selection.shingles import BASE, in_batches, shingles, text_of, tokenize
from tests.selection.rows import conversation

ALPHABET = (
    list("abAB09_ .,!?-'\n")
    + list("éÉßıİﬁＡ①")
    + list("中文字かな。、")
    + ["ไทย", "한국", "हिन्दी", "\U00020000", "😀"]
)


def reference_tokens(text: str) -> list[str]:
    """Words, one character at a time."""
    tokens, word = [], ""
    for character in unicodedata.normalize("NFKC", text).lower():
        code = ord(character)
        is_word = character == "_" or unicodedata.category(character)[0] in "LMN"
        spaceless = (0xE00 <= code <= 0xEFF) or (0x3040 <= code <= 0x312F) or (0x3400 <= code <= 0x9FFF)
        is_alone = is_word and (spaceless or code >= 0x20000)
        if (is_alone or not is_word) and word:
            tokens.append(word)
            word = ""
        if is_alone:
            tokens.append(character)
        elif is_word:
            word += character
    return tokens + ([word] if word else [])


def reference_shingles(text: str, size: int) -> list[tuple[str, ...]]:
    tokens = reference_tokens(text)
    if not tokens:
        return []
    return [tuple(tokens[i : i + size]) for i in range(max(1, len(tokens) - size + 1))]


@pytest.mark.parametrize("size", [1, 2, 3, 13])
def test_hashes_are_equal_where_the_shingles_are(size):
    rng = random.Random(size)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 60))) for _ in range(300)]
    hashes = shingles(tokenize(texts), size)
    expected = [reference_shingles(text, size) for text in texts]
    assert (hashes.offsets[1:] - hashes.offsets[:-1]).tolist() == list(map(len, expected))
    flat = sum(expected, [])
    pairs = set(zip(hashes.values.tolist(), flat, strict=True))
    assert len(pairs) == len(set(flat)) == len(set(hashes.values.tolist()))


def test_hashes_depend_on_the_text_alone():
    text = "The quick brown fox 中文"
    alone = tokenize([text]).values.tolist()
    among = tokenize(["other words", text, "more"])
    assert among.values[among.offsets[1] : among.offsets[2]].tolist() == alone
    assert tokenize(["the QUICK, (brown) fox: 中 文!"]).values.tolist() == alone


def test_the_hash_of_a_word_is_a_polynomial_and_a_finalizer():
    """So hashes are the same in each run and on each machine."""
    value = sum((ord(character) + 1) * BASE**i for i, character in enumerate("word")) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    assert tokenize(["some other", "a Word"]).values[-1] == value ^ (value >> 31)


def test_very_long_texts_are_not_cut():
    text = "word " * 400_000 + "end"
    tokens = tokenize([text])
    assert len(tokens.values) == 400_001
    assert len(set(tokens.values.tolist())) == 2


def test_batches_hold_all_texts_in_order():
    texts = [str(i) * 5000 for i in range(100)]
    batches = list(in_batches(iter(texts)))
    assert len(batches) > 1
    assert sum(batches, []) == texts


def test_system_messages_are_not_compared():
    row = conversation("question", "answer", reasoning_content="thought")
    row.messages.insert(0, {"role": "system", "content": "instructions"})
    assert text_of(row) == "question\nanswer\nthought"
    assert text_of(row, "user") == "question"
