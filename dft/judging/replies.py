"""Replies of a judge: strict JSON, of which code fences and a leading train of thought are forgiven, and no more."""

import re
from typing import Any

from dft.judging.prompts import FIRST, SECOND, TIE
from dft.judging.rubric import HIGHEST, LOWEST, Rubric
from dft.reading.rows import RowError
from dft.reading.strict_json import decode_text, kind, validate_value

FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


class ReplyError(Exception):
    """A reply that gives no verdict.

    Args:
        reason: a short name to count by: empty, not_json, wrong_form, wrong_value.
        detail: what is wrong, for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def parse_scores(text: str, rubric: Rubric) -> tuple[dict[str, Any], str]:
    """The score of each criterion, whole numbers from LOWEST to HIGHEST, and the judge's reason, "" for none.

    Raises:
        ReplyError: the reply is anything but the object that was asked for.
    """

    def check(name: str, value: Any) -> None:
        if type(value) is not int or not LOWEST <= value <= HIGHEST:  # true is an int, too
            rule = f"a whole number from {LOWEST} to {HIGHEST}"
            raise ReplyError("wrong_value", f"{name} is {kind(value)}; it must be {rule}")

    return _parse(text, "scores", rubric, check)


def parse_verdicts(text: str, rubric: Rubric) -> tuple[dict[str, Any], str]:
    """FIRST, SECOND or TIE for each criterion, and the judge's reason, "" for none.

    Raises:
        ReplyError: the reply is anything but the object that was asked for.
    """

    def check(name: str, value: Any) -> None:
        if value not in (FIRST, SECOND, TIE):
            shown = f"{value:.40}" if isinstance(value, str) else kind(value)
            raise ReplyError("wrong_value", f"{name} is {shown}; it must be {FIRST}, {SECOND} or {TIE}")

    return _parse(text, "verdicts", rubric, check)


def _parse(text: str, key: str, rubric: Rubric, check: Any) -> tuple[dict[str, Any], str]:
    reply = _json_of(text)
    if not isinstance(reply, dict) or not isinstance(reply.get(key), dict):
        raise ReplyError("wrong_form", f"the reply isn't an object with the object {key}")
    values = reply[key]
    if set(values) != set(rubric.names):
        given = ", ".join(f"{name:.40}" for name in list(values)[:9]) or "(none)"
        raise ReplyError("wrong_form", f"{key} has the keys {given}; they must be {', '.join(rubric.names)}")
    for name in rubric.names:
        check(name, values[name])
    reason = reply.get("reason")
    return {name: values[name] for name in rubric.names}, reason if isinstance(reason, str) else ""


def _json_of(text: str) -> Any:
    """The one JSON value of a reply."""
    text = THOUGHT.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
    text = text.strip()
    fenced = FENCE.fullmatch(text)
    text = fenced[1].strip() if fenced else text
    if not text:
        raise ReplyError("empty", "the reply has no text")
    try:
        value = decode_text(text)
        validate_value(value, "the reply")
    except RowError as error:
        raise ReplyError("not_json", error.detail) from error
    return value
