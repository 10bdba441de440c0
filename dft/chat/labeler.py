"""Labels of a conversation: which parts of its assistant turns are supervised, and how much each part counts."""

import re
from dataclasses import dataclass

import numpy as np

from dft.chat.control_tokens import MARK_START
from dft.chat.example import Example
from dft.chat.template import Span
from dft.config.data import EmptyTurns, TrainOn
from dft.constants import IGNORE_INDEX
from dft.reading.messages import is_empty
from dft.reading.rows import RowError

THINKING_BLOCKS = {  # opening tag -> closing tag
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<|channel|>analysis<|message|>": "<|end|>",
}
THINKING_START = re.compile("|".join(map(re.escape, THINKING_BLOCKS)))


@dataclass
class SupervisedText:
    """A rendered conversation and what is supervised in it.

    Attributes:
        text: the rendered text, with marks.
        spans: the supervised characters.
        loss_weights: one for each span, above 0.
        remarks: see Example.
    """

    text: str
    spans: list[Span]
    loss_weights: list[float]
    remarks: tuple[str, ...] = ()

    @property
    def borders(self) -> list[int]:
        """The start and the end of each span, one after the other."""
        return [border for span in self.spans for border in span]


def weights_of_turns(turns: list[dict], train_on: TrainOn, empty_turns: EmptyTurns) -> list[float]:
    """The loss weight of each turn, 0 for those that are not supervised.

    Args:
        turns: the assistant messages.
        train_on: supervise all turns, or the last one alone.
        empty_turns: supervise the end of an empty turn (keep), don't (skip_turn), or refuse the row (drop_row).

    Raises:
        RowError: nothing is supervised, or there is an empty turn and the row is to be dropped.
    """
    weights = [float(turn.get("weight", 1.0)) for turn in turns]
    if train_on == "last":
        weights[:-1] = [0.0] * len(weights[:-1])
    for i, turn in enumerate(turns):
        if weights[i] > 0 and empty_turns != "keep" and is_empty(turn):
            if empty_turns == "drop_row":
                raise RowError("empty_turn", f"assistant turn {i + 1} says nothing")
            weights[i] = 0.0
    if not any(weights):
        raise RowError("nothing_to_train_on", "every assistant turn has the weight 0 or isn't asked for")
    return weights


def select_spans(
    text: str, spans: list[Span], loss_weights: list[float], mask_thinking: bool
) -> tuple[list[Span], list[float]]:
    """The spans that are supervised, each with its loss weight.

    Args:
        spans: one for each assistant message.
        loss_weights: one for each assistant message.
        mask_thinking: cut thinking blocks out of the spans.

    Raises:
        RowError: nothing is left.
    """
    weighted = list(zip(spans, loss_weights, strict=True))
    if mask_thinking:
        weighted = [(part, weight) for span, weight in weighted for part in _without_thinking(text, span)]
    kept = [(span, weight) for span, weight in weighted if weight > 0]
    if not kept:
        raise RowError("nothing_to_train_on", "every assistant turn has the weight 0 or isn't asked for")
    return [span for span, _ in kept], [weight for _, weight in kept]


def label(supervised: SupervisedText, tokens: tuple[np.ndarray, list[int]] | None) -> Example | RowError:
    """Turns spans of characters into labels of tokens.

    Args:
        tokens: what TextEncoder.encode returns for the text and its borders: the ids, int32 [T], and for each
            border the first token at or after it; None if the text can't be encoded.
    """
    if tokens is None:
        return RowError("control_token_in_text", "this tokenizer can't keep control tokens as plain text")
    ids, borders = tokens
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    loss_weights = None
    if any(weight != 1 for weight in supervised.loss_weights):
        loss_weights = np.ones(len(ids), dtype=np.float32)
    for first, last, weight in zip(borders[::2], borders[1::2], supervised.loss_weights, strict=True):
        labels[first:last] = ids[first:last]
        if loss_weights is not None:
            loss_weights[first:last] = weight
    return Example(ids, labels, loss_weights, MARK_START in supervised.text, supervised.remarks)


def _without_thinking(text: str, span: Span) -> list[Span]:
    """The parts of a span outside its thinking blocks and the white space after each."""
    start, end = span
    parts: list[Span] = []
    while opening := THINKING_START.search(text, start, end):
        closing_tag = THINKING_BLOCKS[opening[0]]
        closing = text.find(closing_tag, opening.end(), end)
        if closing < 0:
            break
        parts.append((start, opening.start()))
        start = closing + len(closing_tag)
        while start < end and text[start].isspace():
            start += 1
    return [(a, b) for a, b in [*parts, (start, end)] if a < b]
