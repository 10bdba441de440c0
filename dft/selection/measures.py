"""Measures of a text: repetition and entropy.

The shares of repeated lines and n-grams are of the kind that J. Rae et al. filter web pages by (Scaling Language
Models: Gopher, 2021, table A1), in words here instead of characters.
"""

import math
from collections import Counter

import numpy as np

from dft.reading.rows import Conversation
from dft.selection.shingles import shingles, tokenize


def texts_of(row: Conversation, role: str) -> str:
    """The contents of the messages of one role, a line feed between them."""
    return "\n".join(message["content"] for message in row.messages if message["role"] == role)


def num_characters(row: Conversation) -> int:
    """Characters of all messages."""
    return sum(len(message["content"]) for message in row.messages)


def num_turns(row: Conversation) -> int:
    """Messages of the assistant."""
    return sum(message["role"] == "assistant" for message in row.messages)


def repeated_lines(row: Conversation) -> float:
    """Of the assistant's lines that are not empty, the share that repeats an earlier one; 0 without lines."""
    lines = [line.strip() for line in texts_of(row, "assistant").split("\n")]
    lines = [line for line in lines if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def repeated_ngrams(row: Conversation, size: int) -> float:
    """Of the n-grams of the assistant's words, the share that repeats an earlier one; 0 without words."""
    _, counts, _ = _ngrams(row, size)
    return float(1 - len(counts) / counts.sum()) if len(counts) else 0.0


def top_ngram(row: Conversation, size: int) -> float:
    """The share of the assistant's words that the commonest n-gram makes, at most 1; 0 if none occurs twice."""
    _, counts, num_words = _ngrams(row, size)
    times = int(counts.max(initial=0))
    return min(1.0, times * size / num_words) if times > 1 else 0.0


def _ngrams(row: Conversation, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The different n-grams of the assistant's words, how often each occurs, and the number of words."""
    tokens = tokenize([texts_of(row, "assistant")])
    values, counts = np.unique(shingles(tokens, size).values, return_counts=True)
    return values, counts, len(tokens.values)


def entropy(row: Conversation) -> float:
    """Shannon entropy of the characters of all messages, −Σ p·log₂ p over their frequencies, in bits.

    English prose has 4 to 4.5, Chinese 6 to 9; one character repeated has 0.
    """
    counts = Counter("\n".join(message["content"] for message in row.messages))
    total = counts.total()
    return -sum(n / total * math.log2(n / total) for n in counts.values()) + 0.0 if total else 0.0
