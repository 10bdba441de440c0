"""Texts as sets of hashed word n-grams, for many texts at once.

A token is a word in lower case, without punctuation, or one character of a script that writes without spaces (Chinese,
Japanese, Thai, Lao, Burmese, Khmer). A shingle is a run of tokens. Both are 64-bit hashes that depend on the text
alone, so they are the same in each run and on each machine. R texts, N tokens, S shingles.
"""

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dft.reading.rows import Conversation

BATCH_CHARACTERS = 1 << 17  # arrays of a batch then stay in the processor's cache
OTHER, WORD, ALONE = 0, 1, 2  # kinds of characters: between words, of words, a token by itself
WITHOUT_SPACES = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3040, 0x312F)),
    *((0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)
LAST_LISTED = 0x20000  # the planes above hold Chinese characters, and no other words
BASE = 0x9E3779B97F4A7C15  # of the polynomial that is a word's hash; odd, so that it has an inverse modulo 2**64
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of the finalizer of SplitMix64


@dataclass
class Hashes:
    """Hashes of the tokens or the shingles of several texts, in order.

    Those of text i are values[offsets[i] : offsets[i + 1]].
    """

    values: np.ndarray  # uint64 [N]
    offsets: np.ndarray  # int64 [R + 1]


def text_of(row: Conversation, part: str = "all") -> str:
    """What is compared of a row: the messages without the system's, which many rows share.

    Args:
        part: all, or a role whose messages are taken alone.
    """
    texts = []
    for message in row.messages:
        role = message["role"]
        if role == part or (part == "all" and role not in ("system", "developer")):
            texts += [message["content"], *_other_texts(message)]
    return "\n".join(texts)


def _other_texts(message: dict[str, Any]) -> list[str]:
    """The reasoning and the tool calls of a message."""
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    return [*([reasoning] if isinstance(reasoning, str) else []), *([str(calls)] if calls else [])]


def in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in batches of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(texts: list[str]) -> Hashes:
    """The tokens of several texts."""
    normalized = [(text if text.isascii() else unicodedata.normalize("NFKC", text)).lower() for text in texts]
    joined = "\n".join(normalized).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(joined, dtype=np.uint32)
    kinds = np.zeros(len(codes) + 2, dtype=np.uint8)
    np.take(_kinds_of_characters(), codes, out=kinds[1:-1])
    is_alone, is_word = kinds == ALONE, kinds == WORD
    starts = np.flatnonzero(is_alone[1:-1] | (is_word[1:-1] & ~is_word[:-2]))
    ends = np.flatnonzero(is_alone[1:-1] | (is_word[1:-1] & ~is_word[2:])) + 1
    borders = np.cumsum([0] + [len(text) + 1 for text in normalized])  # of the texts, in characters
    return Hashes(_hashes_of_words(codes, starts, ends), np.searchsorted(starts, borders))


def _hashes_of_words(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A polynomial in BASE of the characters of each word, from differences of the sums over all characters before."""
    powers, inverses = _powers(1 << max(len(codes) - 1, BATCH_CHARACTERS).bit_length())
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum((codes + np.uint64(1)) * powers[: len(codes)], out=sums[1:])
    return _mixed((sums[ends] - sums[starts]) * inverses[starts])


def shingles(tokens: Hashes, size: int) -> Hashes:
    """The runs of `size` tokens of each text; a text of fewer tokens is one shingle, one without tokens none."""
    counts = np.diff(tokens.offsets)
    pad = size - 1  # empty tokens behind each text keep shingles inside it
    row = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(len(tokens.values)) + row * pad
    padded = np.zeros(len(tokens.values) + len(counts) * pad, dtype=np.uint64)
    padded[places] = tokens.values
    num_starts = len(padded) - pad
    hashes = padded[:num_starts].copy()
    for i in range(1, size):
        hashes *= FACTORS[0]
        hashes ^= hashes >> np.uint64(29)
        hashes += padded[i : i + num_starts]
    own = np.where(counts > 0, np.maximum(counts - pad, 1), 0)
    is_start = np.arange(len(tokens.values)) - tokens.offsets[:-1][row] < own[row]
    return Hashes(_mixed(hashes[places[is_start]]), np.concatenate([[0], np.cumsum(own)]))


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of the result depends on every bit of the value."""
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * factor
    return values ^ (values >> np.uint64(31))


@cache
def _kinds_of_characters() -> np.ndarray:
    """The kind of each code point, uint8 [0x110000]: letters, marks, digits and the underscore make words."""
    kinds = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    kinds[:LAST_LISTED] = [unicodedata.category(chr(code))[0] in "LMN" for code in range(LAST_LISTED)]
    kinds[LAST_LISTED : WITHOUT_SPACES[-1][1] + 1] = WORD
    kinds[ord("_")] = WORD
    for first, last in WITHOUT_SPACES:
        part = kinds[first : last + 1]
        part[part == WORD] = ALONE
    return kinds


@cache
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE and its inverse to the power of 0, 1, 2, …, modulo 2**64, each uint64 [size]."""
    powers = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        factors = np.full(size, base, dtype=np.uint64)
        factors[0] = 1
        powers.append(np.cumprod(factors))
    return powers[0], powers[1]
