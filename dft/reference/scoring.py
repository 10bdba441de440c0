"""Log-probabilities of all supervised tokens of a dataset, by the weights as they are; the ranks share the rows.

Shapes: R rows, N supervised tokens of all rows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist
from datasets import Dataset as HFDataset
from torch import Tensor
from torch.utils.data import Dataset

from dft.batching.sampler import token_lengths
from dft.digest import ROWS_AT_ONCE
from dft.distributed import gather_in_training
from dft.reference.rows import is_supervised

Batch = list[int]  # rows that are scored at once
Score = Callable[[list[dict[str, Any]]], Tensor]  # rows -> log p of their supervised tokens, row by row, [N]


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, int64 [R]."""
    if not isinstance(rows, HFDataset):
        return token_lengths(rows)
    columns = rows.select_columns(["input_ids"]).with_format("arrow").iter(ROWS_AT_ONCE)
    lengths = [np.diff(batch["input_ids"].combine_chunks().offsets.to_numpy()) for batch in columns]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)


def plan_scoring(lengths: np.ndarray, tokens_at_once: int) -> list[Batch]:
    """Rows in batches of similar length, which hold at most so many tokens with padding, or one row.

    Args:
        lengths: tokens of each row, int [R].
    """
    batches: list[Batch] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        # rows come from the longest on, so that the first of a batch says how far its rows are padded
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_at_once:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def score_batch(rows: Dataset, batch: Batch, score: Score) -> list[np.ndarray]:
    """The values of each row of a batch, float32."""
    items = [rows[index] for index in batch]
    counts = [int(is_supervised(item["labels"]).sum()) for item in items]
    values = score(items).float().cpu().numpy()
    return np.split(values, np.cumsum(counts)[:-1])


def score_rows(rows: Dataset, batches: list[Batch], score: Score) -> tuple[np.ndarray, np.ndarray]:
    """The values of all rows on every rank, float32 [N], and the number of them in each row, int [R].

    All ranks must call it together. Each scores its share of the batches, and a few twice, so that all make the same
    number of calls: with sharded weights every call is a collective.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(batches), world):
        batch = batches[min(start + rank, len(batches) - 1)]
        found.update(zip(batch, score_batch(rows, batch, score), strict=True))
    of_row = {index: values for part in reversed(gather_in_training(found)) for index, values in part.items()}
    ordered = [of_row[index] for index in range(len(rows))]
    counts = np.array([len(values) for values in ordered], dtype=np.int64)
    return np.concatenate(ordered) if ordered else np.zeros(0, np.float32), counts
