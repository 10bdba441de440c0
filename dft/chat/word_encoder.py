"""Tokenize texts word by word, each word once, with the tokenizers for which word_splits.py allows it."""

import re
from array import array

import numpy as np
from tokenizers import Tokenizer

from dft.chat.word_splits import split_at_spaces

MAX_CACHED_WORDS = 500_000
MAX_CACHED_LENGTH = 32  # characters; longer words are rarely seen again
ID_BYTES = 4
WORDS_PER_CALL = 256
SIMPLE_WORD = re.compile(r" \S(?:[^ ]*\S)?")  # a word that begins with a space and has no other
SPACE = "Ġ"  # byte-level vocabularies write a space so


class WordEncoder:
    """Tokenizes texts without control tokens, and caches the ids of their words.

    Args:
        backend: a tokenizer that `can_split_at_spaces`, without truncation and padding.
    """

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._cache: dict[str, bytes] = {}  # word -> ids, int32
        vocab = backend.get_vocab(with_added_tokens=True)
        self._begins_with_space = np.zeros(max(vocab.values(), default=0) + 1, dtype=bool)
        self._begins_with_space[[token_id for token, token_id in vocab.items() if token.startswith(SPACE)]] = True
        added = (token.content for token in backend.get_added_tokens_decoder().values())
        model = backend.model
        # Simple words can be told apart only if a token begins with SPACE exactly where the text has a space.
        self._shows_spaces = SPACE in vocab and not (
            model.end_of_word_suffix
            or model.continuing_subword_prefix
            or (model.unk_token or "").startswith(SPACE)
            or any(token.startswith(SPACE) for token in added)
        )

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, int32."""
        split = [split_at_spaces(text) for text in texts]
        missing = set().union(*split).difference(self._cache)
        self._tokenize(list(missing))
        encoded = [b"".join(map(self._cache.__getitem__, words)) for words in split]
        if len(self._cache) > MAX_CACHED_WORDS:
            self._cache.clear()
        else:
            for word in missing:
                if len(word) > MAX_CACHED_LENGTH:
                    del self._cache[word]
        return encoded

    def _tokenize(self, words: list[str]) -> None:
        """Puts the ids of words into the cache.

        Simple words are tokenized as one text, which is faster: each of them begins where a token begins with a space.
        """
        simple = [word for word in words if self._shows_spaces and SIMPLE_WORD.fullmatch(word)]
        groups = [simple[i : i + WORDS_PER_CALL] for i in range(0, len(simple), WORDS_PER_CALL)]
        for group, ids in zip(groups, encode_batch(self._backend, ["".join(group) for group in groups]), strict=True):
            is_first = self._begins_with_space[np.frombuffer(ids, dtype=np.int32)]
            borders = [*(np.flatnonzero(is_first) * ID_BYTES).tolist(), len(ids)]
            for word, start, end in zip(group, borders[:-1], borders[1:], strict=True):
                self._cache[word] = ids[start:end]
        others = list(set(words).difference(simple))
        self._cache.update(zip(others, encode_batch(self._backend, others), strict=True))


def encode_batch(backend: Tokenizer, texts: list[str]) -> list[bytes]:
    """The ids of each text, int32, by the tokenizer itself."""
    return [
        array("i", encoding.ids).tobytes() for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]
