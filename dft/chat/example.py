"""One training row as tokens, and how it is shortened to the longest length."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dft.constants import IGNORE_INDEX
from dft.reading.rows import RowError


@dataclass
class Example:
    """One row ready to train on.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T], -100 where nothing is supervised.
        loss_weights: float32 [T], what the loss of each token is multiplied by; None for 1 everywhere.
        has_control_text: whether control tokens stand in the conversation's own text.
        remarks: names of what the report counts, see dft.data.report.REMARKS, each as often as it occurs.
        is_truncated: whether the row was longer.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray | None = None
    has_control_text: bool = False
    remarks: tuple[str, ...] = ()
    is_truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Tokens with a loss; the first token of a row has none, because nothing predicts it."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def truncate(example: Example, max_length: int, side: Literal["right", "left", "drop"] = "right") -> Example:
    """Shortens a row to at most `max_length` tokens.

    Args:
        side: the end that a longer row loses. right: a turn that is cut keeps its tokens and gets no end-of-turn
            token, which would teach a stop in the middle. drop: longer rows are rejected.

    Raises:
        RowError: no supervised token is left, or the row is too long and `side` is drop.
    """
    length = len(example.input_ids)
    if length > max_length:
        if side == "drop":
            raise RowError("too_long", f"{length} tokens, more than --max_length {max_length}")
        kept = slice(max_length) if side == "right" else slice(length - max_length, None)
        loss_weights = None if example.loss_weights is None else example.loss_weights[kept]
        example = replace(
            example,
            input_ids=example.input_ids[kept],
            labels=example.labels[kept],
            loss_weights=loss_weights,
            is_truncated=True,
        )
    if example.num_supervised == 0:
        raise RowError("nothing_left_after_truncation", f"no assistant token within --max_length {max_length}")
    return example
