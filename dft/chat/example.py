"""One row to train on, as tokens: what it holds, and how it is made to fit."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dft.labels import IGNORE_INDEX


class RowError(Exception):
    """A row that can't be trained on: a short reason to count by, and a detail for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass
class Example:
    """One row ready to train on. input_ids and labels int32 [T]; labels -100 where nothing is supervised."""

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None  # float32 [T], what a token's loss is multiplied by; None: 1 everywhere
    has_control_text: bool = False  # control tokens stand in the conversation's own text
    not_rendered: tuple[str, ...] = ()  # columns that the conversation has and the chat template never shows
    is_truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss scores; the first token of a row is never predicted."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def truncate(example: Example, max_length: int, side: Literal["right", "left", "drop"] = "right") -> Example:
    """A row of at most `max_length` tokens.

    Args:
        side: the end that a longer row loses. right: a turn cut there keeps its tokens and gets no
            end-of-turn token. drop: longer rows are rejected.

    Raises:
        RowError: no supervised token is left, or the row is too long and `side` is drop.
    """
    length = len(example.input_ids)
    if length > max_length:
        if side == "drop":
            raise RowError("too_long", f"{length} tokens, more than --max_length {max_length}")
        kept = slice(max_length) if side == "right" else slice(length - max_length, None)
        weights = None if example.weights is None else example.weights[kept]
        example = replace(
            example,
            input_ids=example.input_ids[kept],
            labels=example.labels[kept],
            weights=weights,
            is_truncated=True,
        )
    if example.num_supervised == 0:
        raise RowError("nothing_left_after_truncation", f"no assistant token within --max_length {max_length}")
    return example
