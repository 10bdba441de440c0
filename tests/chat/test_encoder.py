"""Segments and words get the token ids that they have in the whole text, with every kind of tokenizer.

A tokenizer for which this doesn't hold is recognized.
"""

import json
import random
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dft.chat.control_tokens import MARK_END, MARK_START, ControlTokens, one_of
from dft.chat.text_encoder import WHITE_SPACE, TextEncoder
from dft.chat.word_encoder import WordEncoder, encode_batch
from dft.chat.word_splits import GPT2, can_split_at_spaces, is_safe, split_at_spaces
from tests.chat.families import FAMILIES
from tests.chat.families import tokenizer as family_tokenizer

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


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥\u0800-ゟ゠-ヿ]+".replace("\\u0800", "\u0800"),
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def split_bpe(*expressions: str, normalizer=None, added=(), digits=False, bytes=True) -> PreTrainedTokenizerFast:
    """A tokenizer as most models have it: regular expressions, then bytes."""
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    steps += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions)] if bytes else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return trained(models.BPE(), trainer, normalizer, pre_tokenizers.Sequence(steps), added=added)


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
    "cl100k": lambda: split_bpe(CL100K, normalizer=normalizers.NFC()),
    "o200k": lambda: split_bpe(O200K, added=[AddedToken("cat", normalized=False)]),
    "deepseek": lambda: split_bpe(*DEEPSEEK, normalizer=normalizers.Sequence([])),
    "digits": lambda: split_bpe(digits=True),
    "across spaces": lambda: split_bpe(r"\p{L}+ \p{L}+|\s+|\S"),
    "added with space": lambda: split_bpe(CL100K, added=[AddedToken("e cat", normalized=False)]),
    "many special": lambda: bpe(special=[f"<r{i}>" for i in range(300)] + ["<", "<s>", "<r"]),
}
NOT_SPLITTABLE = {
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


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return TextEncoder(tokenizer, ControlTokens(tokenizer).ids)


def random_text(rng: random.Random, control: list[str]) -> str:
    return "".join(rng.choice(control if rng.random() < 0.3 else PIECES) for _ in range(rng.randrange(25)))


@pytest.mark.parametrize("name", [*TOKENIZERS, *NOT_SPLITTABLE])
def test_ids_and_borders_are_those_of_the_whole_text(name):
    tokenizer = {**TOKENIZERS, **NOT_SPLITTABLE}[name]()
    encoder = encoder_of(tokenizer)
    assert encoder.can_segment == (name in TOKENIZERS)
    rng = random.Random(name)
    control = [*encoder.control][:40] + [token.content for token in tokenizer.added_tokens_decoder.values()][-5:]
    texts = [random_text(rng, control) for _ in range(400)]
    borders = [sorted(rng.randrange(len(text) + 1) for _ in range(3)) for text in texts]
    for text, places, (ids, found) in zip(texts, borders, encoder.encode(texts, borders), strict=True):
        whole = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        assert ids.tolist() == whole.ids, repr(text)
        starts = np.array([start for start, _ in whole.offsets])
        assert found == [int((starts < border).sum()) for border in places], (text, places)


def test_words_are_split_where_that_is_known_to_be_exact():
    expected = {"cl100k", "o200k", "deepseek", "digits", "nfc", "added words", "many special"}
    assert {name for name in TOKENIZERS if encoder_of(TOKENIZERS[name]())._words} - set(FAMILIES) == expected


SAFE = [CL100K, O200K, *DEEPSEEK, GPT2, r"\s", r" ?+[a-z]++|\s++", r"[ \n]\w+|\s+"]
UNSAFE = [
    r"\p{L}+ ",  # a space at the end
    r"\w+ \w+",
    r"[^x]+",
    r"(?: a)",
    r"a(?:b| )",
    r"\p{Z}\p{L}+",
    r"\P{L}x\P{L}",
    r".+",
    r"a[\W]",
    r"a[ -/]",
    r"a[\x20]",
    r"a[^\S]",
    r"(?<=a) b",  # the next ones look around
    r"(?=a)\s+",
    r"a(?!\S)",
    r"(?!\S)\s+",
    r"\bb",
    r"^a",
    r"a$",
    r"a||b",
    r"[a&&[b ]]",
    r"(?i)a",
    r"[\p{L}\p{Z}]+",
    r"[\p{^L}]+",
    r"[\p{Any}]+",
    r"[\t-a]+",
    r"[\r--x]+",
    r"[!-\]]+",
    r"a[!-\]]",
]


@pytest.mark.parametrize("expression", SAFE)
def test_safe_expression_splits_each_piece_as_within_the_text(expression):
    """Only `Split` is run, so this holds for any vocabulary."""
    assert is_safe(expression)
    split = pre_tokenizers.Split(Regex(expression + r"|\s+"), "isolated")
    rng = random.Random(expression)
    for _ in range(3000):
        text = "".join(rng.choice([*PIECES, " b", "c ", "5", "'s", "/", "\r"]) for _ in range(rng.randrange(12)))
        cut = split_at_spaces(text)
        assert "".join(cut) == text
        in_pieces = [part for piece in cut for part, _ in split.pre_tokenize_str(piece)]
        assert in_pieces == [part for part, _ in split.pre_tokenize_str(text)], repr(text)


@pytest.mark.parametrize("expression", UNSAFE)
def test_other_expressions_are_not_safe(expression):
    assert not is_safe(expression)
    assert not can_split_at_spaces(split_bpe(r"\s+", expression).backend_tokenizer)


def test_nothing_is_split_where_no_expression_matches_spaces_or_bytes_are_not_last():
    assert not can_split_at_spaces(split_bpe(CL100K, bytes=False).backend_tokenizer)
    assert not can_split_at_spaces(split_bpe(r"\p{L}+").backend_tokenizer)


def test_texts_are_split_before_single_spaces():
    cut = split_at_spaces(" one two  three\n four. five\n\nsix \x1c seven\u3000 eight ")
    assert cut == [" one", " two  three\n four.", " five\n\nsix \x1c seven\u3000 eight "]
    assert [split_at_spaces(text) for text in ("", " ", "a")] == [[], [" "], ["a"]]


def test_white_space_is_what_the_tokenizers_library_takes_for_it():
    split = pre_tokenizers.Split(Regex(r"\s"), "removed")
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    theirs = set(characters) - {c for part, _ in split.pre_tokenize_str("".join(characters)) for c in part}
    assert theirs <= {character for character in characters if character.isspace()}
    assert set(WHITE_SPACE) == theirs


def test_long_words_are_not_cached_and_a_full_cache_is_emptied(tokenizer, monkeypatch):
    backend = tokenizer.backend_tokenizer
    words = WordEncoder(backend)
    monkeypatch.setattr("dft.chat.word_encoder.MAX_CACHED_WORDS", 3)
    for i in range(9):
        text = f"some words {'x' * 100}{i}"
        assert words.encode([text]) == encode_batch(backend, [text])
        assert set(words._cache) <= {"some", " words"}


def test_tokenizers_with_other_parts_are_not_split():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    twice = split_bpe(CL100K).backend_tokenizer
    twice.pre_tokenizer = pre_tokenizers.Sequence([byte_level, byte_level])
    nothing = split_bpe(CL100K).backend_tokenizer
    nothing.pre_tokenizer = pre_tokenizers.Sequence([])
    dropout = split_bpe(CL100K).backend_tokenizer
    dropout.model.dropout = 0.1
    sampling = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    sampling.pre_tokenizer = byte_level
    assert not any(map(can_split_at_spaces, (twice, nothing, dropout, sampling)))


@pytest.mark.parametrize(
    "vocabulary", ["with space", "without space", "added space", "suffix", "space prefix", "unknown space", "empty"]
)
def test_words_tokenized_together_have_the_ids_of_the_tokenizer(vocabulary, monkeypatch):
    added = [AddedToken("Ġx", normalized=False)] if vocabulary == "added space" else []
    backend = split_bpe(CL100K, added=added).backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {
        "suffix": {"end_of_word_suffix": "</w>"},
        "space prefix": {"continuing_subword_prefix": "Ġ"},
        "unknown space": {"unk_token": "Ġ"},
        "empty": {},
    }
    if vocabulary in special:
        tokens = (
            [] if vocabulary == "empty" else [*alphabet, *(f"Ġ{a}" for a in alphabet), *(f"{a}</w>" for a in "adt")]
        )
        tokens = [token for token in tokens if token not in "qz"]  # some characters are unknown
        backend.model = models.BPE({token: i for i, token in enumerate(tokens)}, [], **special[vocabulary])
    if vocabulary == "without space":
        state = json.loads(backend.to_str())
        del state["model"]["vocab"]["Ġ"]
        state["model"]["merges"] = [merge for merge in state["model"]["merges"] if "Ġ" not in merge]
        backend = Tokenizer.from_str(json.dumps(state))
    words = WordEncoder(backend)
    monkeypatch.setattr("dft.chat.word_encoder.WORDS_PER_CALL", 3)
    assert can_split_at_spaces(backend)
    text = " quiz The cat sat on  the\n mat Ġ Ġx é 中文 of a  thing,   they say 1 12 123 1234 – and\u00a0so on "
    assert words.encode([text, text[5:]]) == encode_batch(backend, [text, text[5:]])


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "unigram always"])
def test_marked_control_tokens_become_no_control_token(name):
    encoder = encoder_of(TOKENIZERS[name]())
    special = np.array(list(encoder.control.values()))
    rng = random.Random(name)
    for _ in range(100):
        own, real = rng.choice([*encoder.control]), rng.choice([*encoder.control])
        text = f"{real}a {MARK_START}{own}{MARK_END} b{real}"
        result = encoder.encode([text], [[]])[0]
        assert result is None or np.isin(result[0], special).sum() == 2


def test_padding_and_truncation_of_the_tokenizer_are_not_applied(tokenizer):
    encoder = encoder_of(tokenizer)
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    ids, _ = encoder.encode(["a b c d e f g"], [[]])[0]
    assert tokenizer.decode(ids) == "a b c d e f g"


def test_one_of_matches_the_longest_word():
    words = ["<a>", "<ab>", "<a>b", "x", "<", "a.c", "xyz"]
    rng = random.Random(0)
    fast = re.compile(one_of(words))
    slow = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    for _ in range(2000):
        text = "".join(rng.choice("<>abxyz.c") for _ in range(12))
        assert [m.span() for m in fast.finditer(text)] == [m.span() for m in slow.finditer(text)]
    assert re.search(one_of([]), "anything") is None
