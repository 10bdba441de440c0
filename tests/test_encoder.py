"""Segments are tokenised as the whole text is, by every kind of tokenizer, or the encoder knows that they aren't."""

import random

import numpy as np
import pytest
from families import FAMILIES
from families import tokenizer as family_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from text_encoder import MARK_END, MARK_START, TextEncoder, one_of

PIECES = [
    "a",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "The cat",
    "é",
    "e\u0301",
    "中文",
    "🙂",
    "’",
    "ﬁ",
    "Ⅳ",
    "123",
    "<",
    "[",
    "|>",
    ".",
    "\u3000",
    "\x1c",
]
CORPUS = ["The cat sat. a.\n\nb", "one\n\n\ntwo 123", "中文 🙂 é e\u0301 ﬁ Ⅳ", "  indented\n  text ’"] * 20


def trained(
    model, trainer, normalizer=None, pre_tokenizer=None, special=("<s>", "</s>"), added=()
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in special], special_tokens=True)
    tokenizer.add_tokens(list(added), special_tokens=False)
    return tokenizer


def bpe(normalizer=None, **settings) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.pop("prefix", False))
    return trained(models.BPE(unk_token="<unk>"), trainer, normalizer, pre_tokenizer, **settings)


def unigram(scheme: str) -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    return trained(models.Unigram(), trainer, normalizer, pre_tokenizers.Metaspace(prepend_scheme=scheme))


def wordpiece() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    return trained(
        models.WordPiece(unk_token="<unk>"), trainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    )


def with_special(added=(), **flags) -> PreTrainedTokenizerFast:
    tokenizer = bpe(added=added)
    tokenizer.add_tokens([AddedToken("<x>", special=True, **flags)], special_tokens=True)
    return tokenizer


TOKENIZERS = {
    **{name: (lambda name=name: family_tokenizer(name)) for name in FAMILIES},
    "nfc": lambda: bpe(normalizers.NFC()),
    "lowercase": lambda: bpe(normalizers.Lowercase()),
    "prefix space": lambda: bpe(prefix=True),
    "unigram always": lambda: unigram("always"),
    "unigram first": lambda: unigram("first"),
    "unigram never": lambda: unigram("never"),
    "wordpiece": wordpiece,
    "left strip": lambda: with_special(lstrip=True, normalized=False),
    "right strip": lambda: with_special(rstrip=True, normalized=False),
    "both strip": lambda: with_special(lstrip=True, rstrip=True, normalized=False),
    "added words": lambda: bpe(added=[AddedToken("cat", normalized=True), AddedToken("\n\n", normalized=False)]),
    "added with strip": lambda: bpe(added=[AddedToken("cat", lstrip=True, rstrip=True)]),
    "many special": lambda: bpe(special=[f"<r{i}>" for i in range(300)] + ["<", "<s>", "<r"]),
}
NOT_CUTTABLE = {
    "single word": lambda: with_special(single_word=True, normalized=False),
    "normalized": lambda: trained_with_normalized(),
    "strip and added white space": lambda: with_special(
        rstrip=True, normalized=False, added=[AddedToken("\n\n", normalized=False)]
    ),
    "overlapping": lambda: bpe(added=[AddedToken("The cat<", normalized=False)]),
    "containing": lambda: bpe(added=[AddedToken("a<s>", normalized=False)]),
}


def trained_with_normalized() -> PreTrainedTokenizerFast:
    tokenizer = bpe(normalizers.Lowercase())
    tokenizer.add_tokens([AddedToken("<X>", special=True, normalized=True)], special_tokens=True)
    return tokenizer


def random_text(rng: random.Random, control: list[str]) -> str:
    return "".join(rng.choice(control if rng.random() < 0.3 else PIECES) for _ in range(rng.randrange(25)))


@pytest.mark.parametrize("name", [*TOKENIZERS, *NOT_CUTTABLE])
def test_ids_and_borders_are_those_of_the_whole_text(name):
    tokenizer = {**TOKENIZERS, **NOT_CUTTABLE}[name]()
    encoder = TextEncoder(tokenizer)
    assert encoder.can_segment == (name in TOKENIZERS)
    rng = random.Random(name)
    control = [*encoder.special][:40] + [token.content for token in tokenizer.added_tokens_decoder.values()][-5:]
    texts = [random_text(rng, control) for _ in range(400)]
    borders = [sorted(rng.randrange(len(text) + 1) for _ in range(3)) for text in texts]
    for text, some, (ids, found) in zip(texts, borders, encoder.encode(texts, borders), strict=True):
        whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        assert ids.tolist() == whole.ids, repr(text)
        starts = np.array([start for start, _ in whole.offsets])
        assert found == [int((starts < border).sum()) for border in some], (text, some)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "unigram always"])
def test_marked_control_tokens_become_no_control_token(name):
    encoder = TextEncoder(TOKENIZERS[name]())
    special = np.array(list(encoder.special.values()))
    rng = random.Random(name)
    for _ in range(100):
        own, real = rng.choice([*encoder.special]), rng.choice([*encoder.special])
        text = f"{real}a {MARK_START}{own}{MARK_END} b{real}"
        result = encoder.encode([text], [[]])[0]
        assert result is None or np.isin(result[0], special).sum() == 2


def test_padding_and_truncation_of_the_tokenizer_have_no_part(tokenizer):
    encoder = TextEncoder(tokenizer)
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    ids, _ = encoder.encode(["a b c d e f g"], [[]])[0]
    assert tokenizer.decode(ids) == "a b c d e f g"


def test_one_of():
    import re

    words = ["<a>", "<ab>", "<a>b", "x", "<", "a.c", "xyz"]
    rng = random.Random(0)
    fast = re.compile(one_of(words))
    slow = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    for _ in range(2000):
        text = "".join(rng.choice("<>abxyz.c") for _ in range(12))
        assert [m.span() for m in fast.finditer(text)] == [m.span() for m in slow.finditer(text)]
    assert re.search(one_of([]), "anything") is None
