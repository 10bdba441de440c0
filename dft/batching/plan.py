"""The batches of a run: padded, padding-free or packed, counted in rows or in tokens."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dft.batching.attention import documents_leak, grows_with_square
from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.packing import PackedRows, best_fit_decreasing, next_fit, next_fit_padded, padded_tokens
from dft.batching.sampler import EpochOrder
from dft.errors import UserError

logger = logging.getLogger(__name__)

SHUFFLES = 4  # of which padding_waste is the mean
Batching = Literal["padded", "padding_free", "packed"]


def choose_batching(wanted: Batching | None, config: PretrainedConfig, attention: str) -> Batching:
    """How rows become batches.

    Args:
        wanted: None for padding_free where attention doesn't pay for it, else padded.

    Raises:
        UserError: it is wanted that documents share a row, and the model wouldn't keep them apart.
    """
    leak, is_dear = documents_leak(config), grows_with_square(config, attention)
    cost = f"{attention} attention takes memory and time that grow with the square of a row of documents"
    if wanted is None:
        if leak or is_dear:
            logger.info("Batches are padded: %s", leak or cost)
        return "padded" if leak or is_dear else "padding_free"
    if wanted != "padded" and leak:
        raise UserError(f"--batching {wanted}: {leak}; use --batching padded")
    if wanted != "padded" and is_dear:
        logger.warning("--batching %s: %s", wanted, cost)
    return wanted


@dataclass
class BatchPlan:
    """How training rows become batches.

    Args:
        batching: padded fills rows up to the longest of a batch; padding_free puts them one after the other;
            packed also chooses those that fill a row.
        max_length: of a packed row, in tokens.
        max_tokens: of a micro-batch, padding among them; None counts micro-batches in rows.
        rows_per_batch: of a micro-batch. batches_per_step: over ranks and accumulation.
        strategy: see EpochOrder; None for group_by_length where rows are padded, else random.
    """

    batching: Batching
    max_length: int
    max_tokens: int | None
    rows_per_batch: int
    batches_per_step: int
    seed: int
    strategy: str | None = None

    def __post_init__(self):
        if self.strategy is None:
            self.strategy = "group_by_length" if self.batching == "padded" and not self.max_tokens else "random"

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What makes a batch of rows."""
        return PaddingCollator(tokenizer) if self.batching == "padded" else FlatteningCollator()

    def bins(self, lengths: np.ndarray) -> np.ndarray | None:
        """Which rows of these lengths [N] belong together, int64 [N]; None if each is alone."""
        if self.batching == "packed":
            return best_fit_decreasing(lengths, self.max_tokens or self.max_length, self.seed)
        if self.max_tokens is None:
            return None
        if self.batching == "padding_free":
            return next_fit(lengths, self.max_tokens, self.seed)
        return next_fit_padded(lengths, self.max_tokens, self.seed)

    def training_rows(self, rows: Dataset, lengths: np.ndarray) -> Dataset:
        """The training set, with rows that belong together as one item."""
        bins = self.bins(lengths)
        return rows if bins is None else PackedRows(rows, bins)

    def add_to_report(self, report: dict[str, Any], lengths: np.ndarray, of_files: list[np.ndarray]) -> None:
        """Adds to a data report what an epoch is made of: rows, bins, padding, steps; and padding_waste to each entry.

        Args:
            lengths: tokens of the training rows, int [N].
            of_files: the same for the rows of each file.
        """
        for entry, some in zip([*report["files"], report["total"]], [*of_files, lengths], strict=True):
            entry["padding_waste"] = padding_waste(some, self.rows_per_batch)
        bins = self.bins(lengths)
        total, num_items = report["total"], len(lengths) if bins is None else int(bins.max()) + 1
        total["training_rows_per_epoch"] = len(lengths)
        total["steps_per_epoch"] = math.ceil(num_items / (self.rows_per_batch * self.batches_per_step))
        total["batching"] = self.batching
        total["padding_share"] = self.padding_share(lengths, bins) if self.batching == "padded" else 0.0
        if bins is not None:
            capacity = self.max_tokens or self.max_length
            total |= {"bins": num_items, "bin_tokens": capacity, "bin_fill": lengths.sum() / (num_items * capacity)}

    def padding_share(self, lengths: np.ndarray, bins: np.ndarray | None) -> float:
        """Share of padding in the first epoch's padded batches, of rows in `bins`, see there."""
        if bins is None:
            step = self.rows_per_batch * self.batches_per_step
            strategy = "random" if self.strategy == "batch_rebalance" else self.strategy
            order = EpochOrder(
                len(lengths), len(lengths), seed=self.seed, strategy=strategy, lengths=lengths, rows_per_step=step
            )
            bins = np.empty(len(lengths), dtype=np.int64)
            bins[list(order)] = np.arange(len(lengths)) // self.rows_per_batch
        return 1 - int(lengths.sum()) / padded_tokens(lengths, bins)


def padding_waste(lengths: np.ndarray, batch_size: int) -> float | None:
    """Share of padding in batches of random rows, each padded to its longest; None without rows."""
    if len(lengths) == 0:
        return None
    rng = np.random.default_rng(0)
    batches = np.arange(len(lengths)) // batch_size
    padded = sum(padded_tokens(rng.permutation(lengths), batches) for _ in range(SHUFFLES))
    return 1 - SHUFFLES * int(lengths.sum()) / padded
