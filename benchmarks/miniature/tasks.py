"""The tasks of the study: additions and other small problems in characters, and rows with and without mistakes.

A problem is a prompt and an answer; an answer's digits begin with the last one, as one adds by hand. Every kind of
problem has two wordings. A rule splits the problems: to train on, to choose learning rates by, and to test.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzASRF+-=?,[]"
PAD, END = 0, 1
VOCABULARY = len(CHARACTERS) + 2
IDS = {character: index + 2 for index, character in enumerate(CHARACTERS)}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_FACTS, NUM_NEW_FACTS = 100, 200
SPLITS = {"test": 0, "validation": 1}  # remainders of a problem's number by 10; all others are for training


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str

    def encoded(self) -> dict[str, list[int]]:
        """A row: input_ids and labels, in which the answer and its end are supervised."""
        prompt, answer = ([IDS[character] for character in text] for text in (self.prompt, self.answer))
        return {"input_ids": [*prompt, *answer, END], "labels": [-100] * len(prompt) + [*answer, END]}


Maker = Callable[[np.random.Generator, str, int], Problem]  # from a split, in a wording


def is_in(split: str, number: int) -> bool:
    remainder = number % 10
    return remainder == SPLITS[split] if split in SPLITS else remainder not in SPLITS.values()


def worded(kind: str, first: str, second: str, sign: str, wording: int) -> str:
    """The prompt of a problem about one or two things."""
    inner = f"{first}{sign}{second}" if wording == 0 else ",".join(filter(None, (first, second)))
    return f"{kind}{inner}=" if wording == 0 else f"{inner}{kind}?"


def addition(digits: int, carries: bool = True) -> Maker:
    """Sums of two numbers of so many digits; if not `carries`, those whose digits add up to less than 10."""

    def make(rng: np.random.Generator, split: str, wording: int) -> Problem:
        size = 10**digits
        while True:
            a, b = map(int, rng.integers(size, size=2))
            if is_in(split, a * 7 + b * 3) and (carries or _is_without_carry(a, b)):
                break
        prompt = worded("A", f"{a:0{digits}}", f"{b:0{digits}}", "+", wording)
        return Problem(prompt, f"{a + b:0{digits + 1}}"[::-1])

    return make


def _is_without_carry(a: int, b: int) -> bool:
    return all(int(x) + int(y) < 10 for x, y in zip(f"{a:03}", f"{b:03}", strict=True))


def subtraction(rng: np.random.Generator, split: str, wording: int) -> Problem:
    """Differences of two numbers of two digits, the greater one first; it has one wording."""
    while True:
        b, a = sorted(map(int, rng.integers(100, size=2)))
        if is_in(split, a * 7 + b * 3):
            return Problem(f"S{a:02}-{b:02}=", f"{a - b:02}"[::-1])


def reversal(rng: np.random.Generator, split: str, wording: int) -> Problem:
    """Three letters from the last to the first; it has one wording."""
    while True:
        chosen = rng.integers(26, size=3)
        if is_in(split, int(chosen @ [1, 3, 7])):
            text = "".join(LETTERS[i] for i in chosen)
            return Problem(f"R{text}=", text[::-1])


def facts(seed: int, count: int) -> Maker:
    """A table of names of three letters with three letters each; there is nothing to tell apart for a test."""
    rng = np.random.default_rng(seed)
    names = rng.choice(26**3, size=count, replace=False)
    values = rng.integers(26, size=(count, 3))
    pairs = zip(names, values, strict=True)
    table = [(spelled(int(name)), "".join(LETTERS[i] for i in value)) for name, value in pairs]

    def make(rng: np.random.Generator, split: str, wording: int) -> Problem:
        name, value = table[rng.integers(count)]
        return Problem(worded("F", name, "", "", wording), value)

    return make


def spelled(number: int) -> str:
    return LETTERS[number // 676] + LETTERS[number // 26 % 26] + LETTERS[number % 26]


OLD_FACTS = facts(seed=11, count=NUM_FACTS)
NEW_FACTS = facts(seed=12, count=NUM_NEW_FACTS)
OTHER_SKILLS: dict[str, Maker] = {"subtraction": subtraction, "reversal": reversal, "facts": OLD_FACTS}
LEARNED: dict[str, Maker] = {"addition": addition(2), "longer": addition(3)}
PRIORS = {  # the additions that a base model has learned
    "knows": {"addition": addition(2), "longer": addition(3)},
    "half": {"addition": addition(2, carries=False)},
    "unknown": {},
}
SHARE = 0.3  # of additions in the rows that a base model learns, if it learns any
ODDS = {"subtraction": 0.65, "reversal": 0.15, "facts": 0.2}  # of the other rows


def base_rows(prior: str, count: int, seed: int) -> list[Problem]:
    """What a base model learns: the other skills, and the additions of its prior."""
    rng = np.random.default_rng(seed)
    additions = PRIORS[prior]
    share = SHARE if additions else 0.0
    makers = [*additions.values(), *OTHER_SKILLS.values()]
    odds = [*[share / len(additions) for _ in additions], *[(1 - share) * ODDS[name] for name in OTHER_SKILLS]]
    return [makers[i](rng, "train", int(rng.integers(2))) for i in rng.choice(len(makers), size=count, p=odds)]


def with_wrong_digit(problem: Problem, rng: np.random.Generator) -> Problem:
    """The same with another digit in one place of the answer."""
    place = int(rng.integers(len(problem.answer)))
    digit = (int(problem.answer[place]) + int(rng.integers(1, 10))) % 10
    return Problem(problem.prompt, f"{problem.answer[:place]}{digit}{problem.answer[place + 1 :]}")


def in_brackets(problem: Problem) -> Problem:
    """The same in a format that no base model has seen."""
    return Problem(problem.prompt, f"[{problem.answer}]")


WRONG = {"clean": 0.0, "wrong 10%": 0.1, "wrong 30%": 0.3}  # share of rows with a wrong digit
DATA = (*WRONG, "new format", "new facts")


def tuning_rows(data: str, count: int, seed: int) -> list[Problem]:
    """The rows of a fine-tuning, all in the first wording."""
    rng = np.random.default_rng(seed)
    maker = NEW_FACTS if data == "new facts" else LEARNED["addition"]
    rows = [maker(rng, "train", 0) for _ in range(count)]
    if data == "new format":
        return [in_brackets(row) for row in rows]
    is_wrong = rng.random(count) < WRONG.get(data, 0.0)
    return [with_wrong_digit(row, rng) if bad else row for row, bad in zip(rows, is_wrong, strict=True)]


def exam(data: str, split: str, count: int) -> dict[str, list[Problem]]:
    """What a fine-tuned model is asked: `target`, the same in the other wording, longer, and the other skills.

    All answers are right ones. New facts are those that were trained on, and have no longer form.
    """
    rng = np.random.default_rng(1000 + SPLITS[split])
    change = in_brackets if data == "new format" else lambda problem: problem
    target = NEW_FACTS if data == "new facts" else LEARNED["addition"]
    sets = {
        "target": [change(target(rng, split, 0)) for _ in range(count)],
        "wording": [change(target(rng, split, 1)) for _ in range(count)],
    }
    if data != "new facts":
        sets["longer"] = [change(LEARNED["longer"](rng, split, 0)) for _ in range(count)]
    for name, maker in OTHER_SKILLS.items():
        sets[name] = [maker(rng, split, int(rng.integers(2))) for _ in range(count)]
    return sets
