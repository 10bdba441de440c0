"""Text to token ids by its words, each tokenized once, for the tokenizers of which word_cuts.py allows it."""

import re
from array import array

import numpy as np
from tokenizers import Tokenizer

from dft.chat.word_splits import pieces

MAX_KEPT = 500_000  # words
MAX_CHARACTERS = 32  # longer words are not kept
ID_BYTES = 4
AT_ONCE = 256  # words
SIMPLE = re.compile(r" \S(?:[^ ]*\S)?")  # with one blank
BLANK = "Ġ"  # as byte-level vocabularies write it


class WordEncoder:
    """Tokenizes texts without control tokens, and keeps the ids of the words in them.

    Args:
        backend: a tokenizer of which `can_cut_at_blanks`, without truncation and padding.
    """

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._kept: dict[str, bytes] = {}  # ids, int32
        vocab = backend.get_vocab(with_added_tokens=True)
        self._begins_with_blank = np.zeros(max(vocab.values(), default=0) + 1, dtype=bool)
        self._begins_with_blank[[token_id for token, token_id in vocab.items() if token.startswith(BLANK)]] = True
        added = (token.content for token in backend.get_added_tokens_decoder().values())
        model = backend.model
        self._shows_blanks = BLANK in vocab and not (
            model.end_of_word_suffix
            or model.continuing_subword_prefix
            or (model.unk_token or "").startswith(BLANK)
            or any(token.startswith(BLANK) for token in added)
        )

    def encode(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, int32."""
        words = [pieces(text) for text in texts]
        missing = set().union(*words).difference(self._kept)
        self._tokenize(list(missing))
        found = [b"".join(map(self._kept.__getitem__, some)) for some in words]
        if len(self._kept) > MAX_KEPT:
            self._kept.clear()
        else:
            for word in missing:
                if len(word) > MAX_CHARACTERS:
                    del self._kept[word]
        return found

    def _tokenize(self, words: list[str]) -> None:
        """Simple words many at once: only the first token of each begins with a blank."""
        simple = [word for word in words if self._shows_blanks and SIMPLE.fullmatch(word)]
        groups = [simple[i : i + AT_ONCE] for i in range(0, len(simple), AT_ONCE)]
        for group, ids in zip(groups, encode_batch(self._backend, ["".join(group) for group in groups]), strict=True):
            is_first = self._begins_with_blank[np.frombuffer(ids, dtype=np.int32)]
            borders = [*(np.flatnonzero(is_first) * ID_BYTES).tolist(), len(ids)]
            for word, start, end in zip(group, borders[:-1], borders[1:], strict=True):
                self._kept[word] = ids[start:end]
        others = list(set(words).difference(simple))
        self._kept.update(zip(others, encode_batch(self._backend, others), strict=True))


def encode_batch(backend: Tokenizer, texts: list[str]) -> list[bytes]:
    """The ids of each text, int32."""
    return [
        array("i", encoding.ids).tobytes() for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]
