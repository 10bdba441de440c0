r"""Scorers: whether an answer is right, by what is read from it and from its reference. Texts in, truth out.

    exact           the whole text; any white space counts as one space
    last_number     the last number in the text: 1,234.5 and 1234.50 are one, 1/2 and \frac{1}{2} are 0.5
    regex:PATTERN   the first match of a pattern: its first group, or all of it where it has none
    json            valid JSON; where the reference is JSON too, of the same value
    tool_call       the tool calls, by name and arguments; a reference without calls wants an answer without any

What stands in a thinking block is not part of an answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from dft.answers.calls import Call, calls_in
from dft.chat.labeler import THINKING_BLOCKS
from dft.config.answers import REGEX
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text, validate_value

LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
# A minus sign behind a letter, a digit or a bracket is a hyphen or a subtraction
NUMBER = re.compile(r"(?:(?<![\w)\].])[-\u2212])?(?:(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?|(\.\d+))(?:/(\d+))?")
MAX_DIGITS = 1000  # Python refuses to read much longer numbers, which only a model that repeats itself writes
ENDS_IN_NUMBER = re.compile(r"\d[\W_]*\Z")
MARKS_OF_RESULTS = ("####", "\\boxed{")
FENCE = re.compile(r"```(?:json|JSON)?[ \t]*\n(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True)
class Scorer:
    """A way to compare an answer with its reference.

    Args:
        name: as it is written in --answer_scorers.
        read: what is compared of a text, a value; None where the text has none.
    """

    name: str
    read: Callable[[str], Any]

    def can_score(self, reference: str) -> bool:
        """Whether an answer could be right with this reference."""
        return self.name == "json" or self.read(reference) is not None

    def is_right(self, answer: str, reference: str) -> bool:
        """Whether both hold the same value."""
        found, wanted = self.read(answer), self.read(reference)
        if wanted is None:
            return self.name == "json" and found is not None
        return found is not None and same_value(found, wanted)


def make_scorer(name: str) -> Scorer:
    """The scorer of a name, which --answer_scorers has been checked for."""
    if name.startswith(REGEX):
        return Scorer(name, partial(read_match, re.compile(name.removeprefix(REGEX))))
    return Scorer(name, READERS[name])


def choose_scorer(reference: str, has_calls: bool) -> str:
    """The scorer that auto stands for: told by the reference alone.

    tool_call where it calls tools, json where it is a JSON object or list, last_number where it ends in a number or
    marks one by #### or a box, else exact.
    """
    if has_calls:
        return "tool_call"
    found = read_json(reference)
    if found is not None and isinstance(found[0], dict | list):
        return "json"
    text = final_text(reference)
    has_number = ENDS_IN_NUMBER.search(text) or any(mark in text for mark in MARKS_OF_RESULTS)
    return "last_number" if has_number and read_last_number(text) is not None else "exact"


def final_text(text: str) -> str:
    """A text without its thinking blocks; nothing of one that ends while it thinks."""
    for opening, closing in THINKING_BLOCKS.items():
        before, tag, thought = text.rpartition(opening)
        if tag and closing not in thought:
            return ""
        text = text.rpartition(closing)[2]
    return text.strip()


def read_text(text: str) -> str:
    """The text, with one space for any white space."""
    return " ".join(final_text(text).split())


def read_last_number(text: str) -> Fraction | None:
    """The last number of a text.

    Commas between groups of three digits are left out, and so are units; there are no exponents.
    """
    text = LATEX_FRACTION.sub(r" \1/\2 ", final_text(text))
    matches = [match for match in NUMBER.finditer(text) if len(match[0]) <= MAX_DIGITS]
    if not matches:
        return None
    match = matches[-1]
    value = Fraction((match[1] or "0").replace(",", "") + (match[2] or match[3] or ""))
    divisor = int(match[4] or 1)
    value = value / divisor if divisor else value
    return -value if match[0][0] in "-\u2212" else value


def read_match(pattern: re.Pattern[str], text: str) -> str | None:
    """What a pattern finds first: its first group, or the whole match where it has no group."""
    match = pattern.search(final_text(text))
    if match is None:
        return None
    return match[1] if pattern.groups else match[0]


def read_json(text: str) -> tuple[Any] | None:
    """The value of a text that is JSON, alone or in a code block, as a tuple of one: null is a value too."""
    text = final_text(text)
    fenced = FENCE.fullmatch(text)
    try:
        value = decode_text(fenced[1] if fenced else text)
        validate_value(value, "the answer")
    except RowError:
        return None
    return (value,)


def read_calls(text: str) -> list[Call]:
    """The tool calls of a text, which may be none."""
    return calls_in(final_text(text))


READERS: dict[str, Callable[[str], Any]] = {
    "exact": read_text,
    "last_number": read_last_number,
    "json": read_json,
    "tool_call": read_calls,
}


def same_value(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: the order of keys doesn't count, 1 is 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    return one == other
