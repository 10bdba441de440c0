"""Keep the rows whose instruction the model needs most for the answer: IFD, arXiv 2308.12032.

    python scripts/select_data.py ifd --model outputs/warm --data_files data/ --output by_ifd --keep_share 0.1
    torchrun --nproc-per-node 8 scripts/select_data.py ifd --model outputs/warm --data_files data/ --output by_ifd

The score of a row is s(A | Q) / s(A): the mean cross-entropy of its answers' tokens in the conversation over that of
the same tokens without it. At 1 and above the instruction doesn't help, and the row is dropped. Scores are kept in
shards: a run that was cut goes on where it was, and another choice computes nothing.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.reading.rows import Conversation
from dft.selection.method import Command, Decide, Decision, Verdict
from dft.selection.model_flags import ModelFlags, add_model_arguments, check_max_length

if TYPE_CHECKING:
    from dft.selection.ifd_scores import IfdScores

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class IfdConfig:
    """Which ratios are kept.

    Args:
        keep_share: of the rows that have a ratio, those of the highest within the bounds; None for all within them.
        min_ratio, max_ratio: of a row that is kept, the latter excluded.
        max_length: longer conversations are cut, in tokens.
    """

    model: ModelFlags
    keep_share: float | None = None
    min_ratio: float = 0.0
    max_ratio: float = 1.0
    max_length: int = 8192

    def __post_init__(self):
        check_share(self.keep_share)
        check_max_length(self.max_length)
        if not 0 <= self.min_ratio < self.max_ratio:
            raise UserError(
                f"--min_ratio {self.min_ratio:g} and --max_ratio {self.max_ratio:g}: ratios are at least 0, and the "
                "first must be below the second"
            )


def check_share(share: float | None) -> None:
    """Raises UserError where a share isn't one."""
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--keep_share {share:g} must be above 0 and at most 1")


def rows_of_share(share: float, count: int) -> int:
    """How many rows a share is at least: that of the number as it is written, since 0.07 in binary is a bit more."""
    return math.ceil(Fraction(str(share)) * int(count))


def highest(scores: np.ndarray, eligible: np.ndarray, count: int) -> np.ndarray:
    """Which rows have the highest scores, bool [R]; of equal ones those that come first.

    Args:
        scores: float [R].
        eligible: which may be chosen, bool [R].
        count: at most so many are.
    """
    indices = np.flatnonzero(eligible)
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[indices[np.argsort(-scores[indices], kind="stable")[:count]]] = True
    return chosen


def ifd(config: IfdConfig) -> Decide:
    """The method of these settings."""

    def decide(rows: Iterator[Conversation]) -> Decision:
        from dft.selection.ifd_scores import ifd_scores

        conversations = list(rows)
        model = config.model.load()
        scores = ifd_scores(
            conversations,
            model,
            max_length=config.max_length,
            tokens_at_once=config.model.tokens_at_once,
            cache=config.model.cache_dir,
        )
        return _decision(conversations, scores, config)

    return decide


def _decision(rows: list[Conversation], scores: "IfdScores", config: IfdConfig) -> Decision:
    has_score = ~np.isnan(scores.ratio)
    within = has_score & (scores.ratio >= config.min_ratio) & (scores.ratio < config.max_ratio)
    wanted = len(rows) if config.keep_share is None else rows_of_share(config.keep_share, has_score.sum())
    kept = highest(scores.ratio, within, wanted)
    verdicts = [_verdict(i, scores, config, bool(within[i]), bool(kept[i])) for i in range(len(rows))]
    notes = []
    unhelpful = int((scores.ratio >= 1).sum())
    if unhelpful:
        notes.append(f"In {unhelpful:,} of {has_score.sum():,} rows the instruction doesn't help with the answer.")
    if config.keep_share is not None and wanted > kept.sum():
        notes.append(f"{kept.sum():,} rows are kept, not {wanted:,}: no others are within the bounds.")
    return Decision(
        verdicts,
        {"ifd": scores.ratio, "loss with instruction": scores.with_instruction, "loss of answer alone": scores.alone},
        {SCORES: [_entry(row, i, scores) for i, row in enumerate(rows)]},
        {"least ratio kept": round(float(scores.ratio[kept].min()), 6) if kept.any() else None},
        notes,
    )


def _verdict(index: int, scores: "IfdScores", config: IfdConfig, within: bool, kept: bool) -> Verdict:
    if index in scores.refusals:
        error = scores.refusals[index]
        return Verdict(error.reason, error.detail)
    ratio = float(scores.ratio[index])
    if kept:
        return Verdict(score=ratio)
    if within:
        return Verdict(
            "below_share", f"IFD {ratio:.4f}, not among the highest {config.keep_share:g} of the rows", ratio
        )
    if ratio < config.min_ratio:
        return Verdict("ifd_too_low", f"IFD {ratio:.4f}, less than {config.min_ratio:g}", ratio)
    return Verdict("ifd_too_high", f"IFD {ratio:.4f}, at least {config.max_ratio:g}", ratio)


def _entry(row: Conversation, index: int, scores: "IfdScores") -> dict[str, Any]:
    """A line of scores.jsonl; null where there is no score, or it is infinite."""
    numbers = {
        "ifd": scores.ratio[index],
        "loss_with_instruction": scores.with_instruction[index],
        "loss_alone": scores.alone[index],
    }
    shown = {name: round(float(value), 6) if np.isfinite(value) else None for name, value in numbers.items()}
    return {"path": printable(row.path), "line": row.line, **shown, "tokens": int(scores.tokens[index])}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=path_argument, required=True, help="directory of a model or an adapter")
    parser.add_argument("--keep_share", type=float, help="keep the highest ratios: 0.1 for a tenth of the rows")
    parser.add_argument("--min_ratio", type=float, default=0.0, help="of rows that are kept; by default 0")
    parser.add_argument("--max_ratio", type=float, default=1.0, help="kept rows lie below it; by default 1")
    parser.add_argument("--max_length", type=int, default=8192, help="longer rows are cut, in tokens")
    add_model_arguments(parser)


def _method(args: argparse.Namespace) -> Decide:
    flags = ModelFlags.of(args, args.model, "--model")
    return ifd(IfdConfig(flags, args.keep_share, args.min_ratio, args.max_ratio, args.max_length))


COMMAND = Command("ifd", "keep rows whose instruction is needed for the answer", __doc__, _add_arguments, _method)
