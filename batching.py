"""Rows to batches."""

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from data_report import PADDED_TO


class PaddingCollator(DataCollatorForSeq2Seq):
    """Pads rows to the longest of a batch, on the right, to a multiple of 8 tokens.

    A batch holds input_ids, attention_mask, labels (-100 on padding) and, where the rows have them,
    loss_weights (float32); each [B, T].
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer, pad_to_multiple_of=PADDED_TO)

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        weights = [row.get("loss_weights") for row in features]
        rows = [{key: value for key, value in row.items() if key != "loss_weights"} for row in features]
        batch = super().__call__(rows, return_tensors)
        if any(some is not None for some in weights):
            padded = torch.ones(batch["labels"].shape, dtype=torch.float32)
            for i, some in enumerate(weights):
                if some is not None:
                    padded[i, : len(some)] = torch.as_tensor(some)
            batch["loss_weights"] = padded
        return batch
