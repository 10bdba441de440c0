"""What a run has asked for: requests, failures by reason, tokens, and their price."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dft.errors import UserError
from dft.judging.votes import Vote
from dft.printable import printable

MILLION = 1_000_000
HINTS = {"cut_off": " (see --max_tokens)", "timeout": " (see --timeout)"}


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens, in any currency; None where there is none to reckon with."""

    prompt: float | None = None
    completion: float | None = None

    def __post_init__(self) -> None:
        given = [price for price in (self.prompt, self.completion) if price is not None]
        if len(given) == 1 or any(not 0 <= price < float("inf") for price in given):
            raise UserError("--price_in and --price_out must be given together, and be at least 0")


@dataclass
class Costs:
    """The requests of one run; those of earlier runs, whose rows aren't asked for again, don't count.

    Attributes:
        failures: {reason: requests}.
        examples: {reason: what went wrong, the first time}.
        uncounted: replies whose tokens the server doesn't count.
    """

    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def add(self, vote: Vote) -> None:
        """Counts one more request."""
        self.requests += 1
        if vote.failure:
            self.failures[vote.failure] += 1
            self.examples.setdefault(vote.failure, printable(vote.detail))
        self.prompt_tokens += vote.prompt_tokens or 0
        self.completion_tokens += vote.completion_tokens or 0
        self.uncounted += not vote.is_unanswered and vote.completion_tokens is None

    @property
    def failed_share(self) -> float:
        return self.failures.total() / self.requests if self.requests else 0.0

    def price(self, prices: Prices) -> float | None:
        """Of all counted tokens, in the currency of the prices; None without prices."""
        if prices.prompt is None or prices.completion is None:
            return None
        return (self.prompt_tokens * prices.prompt + self.completion_tokens * prices.completion) / MILLION

    def as_json(self, prices: Prices) -> dict[str, Any]:
        """For the report."""
        return {
            "made": self.requests,
            "failed": dict(self.failures),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "replies_without_token_counts": self.uncounted,
            "price": self.price(prices),
        }

    def lines(self, prices: Prices) -> list[str]:
        """For the console."""
        price = self.price(prices)
        text = f"{self.requests:,} requests, {self.prompt_tokens:,} prompt tokens, "
        text += f"{self.completion_tokens:,} completion tokens"
        lines = [text if price is None else f"{text}, price {price:,.4f}"]
        if self.uncounted:
            lines.append(f"{self.uncounted:,} replies came without counts of tokens: there are more than these")
        if self.failures:
            lines.append(f"{self.failures.total():,} requests failed ({self.failed_share:.1%}):")
        for reason, count in self.failures.most_common():
            lines.append(f"  {count:,} {reason}{HINTS.get(reason, '')}, the first: {self.examples[reason]}")
        return lines
