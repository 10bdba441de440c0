"""The batches of a run: padded, padding-free or packed, counted in rows or in tokens.

Shapes: N rows.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dft.batching.attention import is_quadratic, why_documents_leak
from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.packing import PackedRows, best_fit_decreasing, next_fit, next_fit_padded, padded_tokens
from dft.batching.sampler import EpochOrder
from dft.config.training import DFTTrainingArguments, num_batches_at_once
from dft.errors import UserError

logger = logging.getLogger(__name__)

SHUFFLES = 4  # padding_waste is the mean over so many random orders
Batching = Literal["padded", "padding_free", "packed"]


def choose_batching(requested: Batching | None, config: PretrainedConfig, attention: str) -> Batching:
    """Chooses how rows become batches.

    Args:
        requested: None for padding_free where it costs nothing in attention, else padded.
        config, attention: of the model, and its attention implementation.

    Raises:
        UserError: documents were requested to share a row, and the model wouldn't keep them apart.
    """
    leak, quadratic = why_documents_leak(config), is_quadratic(config, attention)
    cost = f"{attention} attention takes memory and time that grow with the square of a row of documents"
    if requested is None:
        if leak or quadratic:
            logger.info("Batches are padded: %s", leak or cost)
        return "padded" if leak or quadratic else "padding_free"
    if requested != "padded" and leak:
        raise UserError(f"--batching {requested}: {leak}; use --batching padded")
    if requested != "padded" and quadratic:
        logger.warning("--batching %s: %s", requested, cost)
    return requested


@dataclass
class BatchPlan:
    """How training rows become batches.

    Args:
        batching: "padded" pads rows to the longest of a batch; "padding_free" lays them one after the other; "packed"
            does so with rows chosen to fill `max_length`.
        max_length: tokens of a packed row.
        max_tokens: tokens of a micro-batch, including padding; None if micro-batches are counted in rows.
        rows_per_batch: items of a micro-batch: rows, or bins of rows.
        batches_per_step: micro-batches of a step, over ranks and accumulation.
        seed: of the order and of the bins.
        batches_at_once: micro-batches that are computed at the same time: one of each process, or of each group of
            processes that compute one together.
        drop_last: whether the last rows of an epoch are left out where they don't fill a micro-batch on every rank.
        strategy: order of the rows, see EpochOrder. None is group_by_length where rows are padded and micro-batches
            counted in rows, because the padding then depends on the order, else random.
    """

    batching: Batching
    max_length: int
    max_tokens: int | None
    rows_per_batch: int
    batches_per_step: int
    seed: int
    strategy: str | None = None
    batches_at_once: int = 1
    drop_last: bool = False

    def __post_init__(self):
        if self.strategy is None:
            self.strategy = "group_by_length" if self.batching == "padded" and not self.max_tokens else "random"

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> PaddingCollator | FlatteningCollator:
        """Makes the collator of the training rows."""
        return PaddingCollator(tokenizer) if self.batching == "padded" else FlatteningCollator()

    def bins(self, lengths: np.ndarray) -> np.ndarray | None:
        """The bin of each row, int64 [N], by its tokens, int [N]; None if every row is an item of its own."""
        if self.batching == "packed":
            return best_fit_decreasing(lengths, self.max_tokens or self.max_length, self.seed)
        if self.max_tokens is None:
            return None
        if self.batching == "padding_free":
            return next_fit(lengths, self.max_tokens, self.seed)
        return next_fit_padded(lengths, self.max_tokens, self.seed)

    def training_rows(self, rows: Dataset, lengths: np.ndarray) -> Dataset:
        """The training set, with the rows of a bin as one item.

        Args:
            lengths: tokens of each row, int [N].
        """
        bins = self.bins(lengths)
        return rows if bins is None else PackedRows(rows, bins)

    def check_rows(self, lengths: np.ndarray) -> None:
        """Raises UserError where incomplete micro-batches are dropped, and there is no complete one.

        Args:
            lengths: tokens of each training row, int [N].
        """
        if not self.drop_last:
            return
        bins = self.bins(lengths)
        num_items, needed = _num_items(lengths, bins), self.rows_per_batch * self.batches_at_once
        if num_items < needed:
            kind = "rows" if bins is None else "bins of rows"
            raise UserError(
                f"--dataloader_drop_last True: {self.batches_at_once} micro-batches at once take {needed} {kind}, and "
                f"there are {num_items}, so that nothing would be trained on; drop the flag, or lower "
                "--per_device_train_batch_size"
            )

    def steps_per_epoch(self, num_items: int) -> int:
        """The optimizer's steps in an epoch of rows, or of bins of rows."""
        batches = num_items / (self.rows_per_batch * self.batches_at_once)
        batches = math.floor(batches) if self.drop_last else math.ceil(batches)
        return math.ceil(batches * self.batches_at_once / self.batches_per_step)

    def steps_of_run(self, lengths: np.ndarray, max_steps: int, num_epochs: float) -> int:
        """The optimizer's steps of a training: `max_steps`, or those of its epochs where that isn't above 0.

        Args:
            lengths: tokens of each training row, int [N].
        """
        if max_steps > 0:
            return max_steps
        return math.ceil(num_epochs * self.steps_per_epoch(_num_items(lengths, self.bins(lengths))))

    def add_to_report(self, report: dict[str, Any], lengths: np.ndarray, lengths_by_file: list[np.ndarray]) -> None:
        """Adds what an epoch consists of to a data report: rows, bins, padding, steps; and padding_waste to each file.

        Args:
            report: see dft.data.report.make_report.
            lengths: tokens of each training row, int [N].
            lengths_by_file: the same for the rows of each file.
        """
        total = report["total"]
        for entry, lengths_of_entry in zip([*report["files"], total], [*lengths_by_file, lengths], strict=True):
            entry["padding_waste"] = padding_waste(lengths_of_entry, self.rows_per_batch)
        bins = self.bins(lengths)
        num_items = _num_items(lengths, bins)
        total["training_rows_per_epoch"] = len(lengths)
        total["steps_per_epoch"] = self.steps_per_epoch(num_items)
        total["batching"] = self.batching
        total["padding_share"] = self.padding_share(lengths, bins) if self.batching == "padded" else 0.0
        if bins is not None:
            capacity = self.max_tokens or self.max_length
            total |= {"bins": num_items, "bin_tokens": capacity, "bin_fill": lengths.sum() / (num_items * capacity)}

    def padding_share(self, lengths: np.ndarray, bins: np.ndarray | None) -> float:
        """Share of padding in the padded batches of the first epoch.

        Args:
            lengths: tokens of each row, int [N].
            bins: see `bins`; a bin is a micro-batch.
        """
        if bins is None:
            rows_per_step = self.rows_per_batch * self.batches_per_step
            # batch_rebalance is transformers' own sampler, whose order isn't known here
            strategy = "random" if self.strategy == "batch_rebalance" else self.strategy
            num_rows = len(lengths)
            order = EpochOrder(
                num_rows,
                num_rows,
                seed=self.seed,
                strategy=strategy,
                lengths=lengths,
                rows_per_step=rows_per_step,
            )
            bins = np.empty(num_rows, dtype=np.int64)
            bins[list(order)] = np.arange(num_rows) // self.rows_per_batch
        return 1 - int(lengths.sum()) / padded_tokens(lengths, bins)


def _num_items(lengths: np.ndarray, bins: np.ndarray | None) -> int:
    return len(lengths) if bins is None else int(bins.max()) + 1


def padding_waste(lengths: np.ndarray, batch_size: int) -> float | None:
    """Share of padding if batches were made of random rows, each padded to the longest; None without rows.

    Args:
        lengths: tokens of each row, int [N].
        batch_size: in rows.
    """
    if len(lengths) == 0:
        return None
    rng = np.random.default_rng(0)
    batches = np.arange(len(lengths)) // batch_size
    padded = sum(padded_tokens(rng.permutation(lengths), batches) for _ in range(SHUFFLES))
    return 1 - SHUFFLES * int(lengths.sum()) / padded


def plan_batches(args: DFTTrainingArguments, max_length: int, config: PretrainedConfig, attention: str) -> BatchPlan:
    """Plans the batches of a run.

    Args:
        max_length: tokens of a row.
        config, attention: of the model, and its attention implementation; they decide what the arguments leave open.

    Raises:
        UserError: documents were requested to share a row, and the model wouldn't keep them apart.
    """
    return BatchPlan(
        choose_batching(args.batching, config, attention),
        max_length=max_length,
        max_tokens=args.max_tokens_per_batch,
        rows_per_batch=args.per_device_train_batch_size,
        batches_per_step=args.gradient_accumulation_steps * num_batches_at_once(args),
        seed=args.seed if args.data_seed is None else args.data_seed,
        strategy=args.train_sampling_strategy,
        batches_at_once=num_batches_at_once(args),
        drop_last=args.dataloader_drop_last,
    )
