"""Votes: several replies to one question, of which the median counts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from dft.judging.prompts import FIRST, SECOND, TIE

NO_REPLY = ("timeout", "no_connection", "bad_response")  # failures, and those that begin with http_


@dataclass(frozen=True)
class Vote:
    """What became of one request.

    Args:
        order: whose answer came first, of a comparison: "AB" or "BA"; else "".
        seed: that the request was made with.
        values: what the judge said of each criterion; None for a request that failed.
        reason: the judge's, in words.
        failure: a short name to count by; "" for none.
        detail: of the failure, for people.
        prompt_tokens, completion_tokens: as the server counts them; None where it doesn't say.
    """

    order: str
    seed: int
    values: dict[str, Any] | None
    reason: str = ""
    failure: str = ""
    detail: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def is_unanswered(self) -> bool:
        """Whether the server sent no reply at all."""
        return self.failure in NO_REPLY or self.failure.startswith("http_")

    def as_json(self) -> dict[str, Any]:
        """For a line of the output, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


def vote_from_json(value: dict[str, Any]) -> Vote:
    """The vote that `as_json` has written.

    Raises:
        KeyError, TypeError: it hasn't.
    """
    return Vote(**{"order": "", "values": None, **value})


def valid_votes(votes: Sequence[Vote], order: str = "") -> list[Vote]:
    """The valid votes of one order; none, unless they are more than half of those that were asked for."""
    asked = [vote for vote in votes if vote.order == order]
    valid = [vote for vote in asked if vote.values is not None]
    return valid if 2 * len(valid) > len(asked) else []


def median_scores(votes: Sequence[Vote], names: Sequence[str]) -> dict[str, float]:
    """The median of the valid votes for each criterion; of an even number, the mean of the middle two."""
    return {name: float(median(vote.values[name] for vote in votes)) for name in names}


def median_verdicts(votes: Sequence[Vote], names: Sequence[str]) -> dict[str, int]:
    """1 for each criterion on which the valid votes prefer A, -1 for B, 0 for a tie.

    It is the median of the votes; between two different ones it is a tie.
    """
    return {name: int(median(preference(vote, name) for vote in votes)) for name in names}


def preference(vote: Vote, name: str) -> int:
    """What a vote says of A and B: 1 for A, -1 for B, 0 for a tie, whichever came first."""
    by_place = {FIRST: 1, SECOND: -1, TIE: 0}[vote.values[name]]
    return by_place if vote.order == "AB" else -by_place


def differs(votes: Sequence[Vote], name: str) -> bool:
    """Whether the valid votes disagree on a criterion."""
    return len({vote.values[name] for vote in votes}) > 1
