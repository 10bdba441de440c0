"""Random texts with the word frequencies of a language, and rows of them."""

import random
from itertools import accumulate

from dft.reading.rows import Conversation

NUM_WORDS = 5000


class Writer:
    """Makes texts; the same for the same seed."""

    def __init__(self, seed: int = 0):
        self.rng = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.vocabulary = ["".join(self.rng.choices(letters, k=self.rng.randint(2, 9))) for _ in range(NUM_WORDS)]
        self._weights = list(accumulate(1 / (rank + 10) for rank in range(NUM_WORDS)))

    def words(self, count: int) -> list[str]:
        return self.rng.choices(self.vocabulary, cum_weights=self._weights, k=count)

    def edited(self, words: list[str], per_100: int) -> list[str]:
        """The words with so many random substitutions, insertions and deletions in a hundred."""
        words = list(words)
        for _ in range(round(len(words) * per_100 / 100)):
            place = self.rng.randrange(len(words))
            action = self.rng.choice(("substitute", "insert", "delete"))
            if action == "delete":
                del words[place]
            else:
                words[place : place + (action == "substitute")] = self.words(1)
        return words


def conversation(prompt: str, answer: str, line: int = 1, **message) -> Conversation:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer, **message}]
    return Conversation(messages, None, None, "rows.jsonl", line, "")


def as_row(words: list[str], line: int = 1) -> Conversation:
    return conversation(" ".join(words[:20]), " ".join(words[20:]), line)
