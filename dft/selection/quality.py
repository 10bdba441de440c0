"""Keep the rows that a reward model, or a classifier of quality, scores highest.

    python scripts/select_data.py quality --reward_model rm --data_files data/ --output good --alpha 0.0
    python scripts/select_data.py quality --reward_model classifier --label good --data_files data/ --output good \\
        --keep_share 0.5

The model is a directory that transformers' AutoModelForSequenceClassification loads. With one output its score is used
as it is; with several, the probability of --label. A row is shown to it by its own chat template, up to the last
answer; without a template as a pair of texts: what precedes the last answer, and that answer.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dft.errors import UserError
from dft.files import path_argument
from dft.reading.rows import Conversation
from dft.selection.ifd import check_share, highest, rows_of_share
from dft.selection.method import Command, Decide, Decision, Verdict
from dft.selection.model_flags import ModelFlags, add_model_arguments, check_max_length


@dataclass(frozen=True)
class QualityConfig:
    """Which scores are kept.

    Args:
        alpha: the least score of a kept row.
        keep_share: of the rows that have a score, those of the highest.
        label: see RewardModel.
        max_length: longer rows are dropped, in tokens; None for what the model takes.
    """

    model: ModelFlags
    alpha: float | None = None
    keep_share: float | None = None
    label: str | None = None
    max_length: int | None = None

    def __post_init__(self):
        check_share(self.keep_share)
        check_max_length(self.max_length)
        if self.alpha is None and self.keep_share is None:
            raise UserError("give --alpha, --keep_share or both: else every row would be kept")
        if self.alpha is not None and not np.isfinite(self.alpha):
            raise UserError(f"--alpha {self.alpha:g} must be a finite number")


def quality(config: QualityConfig) -> Decide:
    """The method of these settings."""

    def decide(rows: Iterator[Conversation]) -> Decision:
        from dft.selection.reward_model import RewardModel

        conversations = list(rows)
        flags = config.model
        model = RewardModel(flags, config.label)
        scores, refusals = model.scores(conversations, config.max_length, flags.tokens_at_once, flags.cache_dir)
        has_score = ~np.isnan(scores)
        good = has_score if config.alpha is None else has_score & (scores >= config.alpha)
        wanted = len(scores) if config.keep_share is None else rows_of_share(config.keep_share, has_score.sum())
        kept = highest(scores, good, wanted)
        verdicts = []
        for index, score in enumerate(scores.tolist()):
            if index in refusals:
                verdicts.append(Verdict(refusals[index].reason, refusals[index].detail))
            elif kept[index]:
                verdicts.append(Verdict(score=score))
            elif good[index]:
                detail = f"score {score:.4g}, not in the highest {config.keep_share:g} of the rows"
                verdicts.append(Verdict("below_share", detail, score))
            else:
                verdicts.append(Verdict("low_quality", f"score {score:.4g}, less than {config.alpha:g}", score))
        least = round(float(scores[kept].min()), 6) if kept.any() else None
        return Decision(verdicts, {"quality": scores}, facts={"least score kept": least})

    return decide


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward_model", type=path_argument, required=True, help="directory of a sequence classifier")
    parser.add_argument("--label", help="of a classifier with several labels: its name or number")
    parser.add_argument("--alpha", type=float, help="the least score of a row that is kept")
    parser.add_argument("--keep_share", type=float, help="keep the highest scores: 0.1 for a tenth of the rows")
    parser.add_argument("--max_length", type=int, help="longer rows are dropped, in tokens")
    add_model_arguments(parser)


def _method(args: argparse.Namespace) -> Decide:
    flags = ModelFlags.of(args, args.reward_model, "--reward_model")
    return quality(QualityConfig(flags, args.alpha, args.keep_share, args.label, args.max_length))


COMMAND = Command("quality", "keep the rows that a reward model scores highest", __doc__, _add_arguments, _method)
