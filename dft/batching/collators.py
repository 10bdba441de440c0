"""Collators: rows padded to one length, or laid one after the other in a single row without padding.

Without padding, a batch is one row [1, S] of several documents. Position ids restart at 0 with each document, there is
no attention mask, and the first label of each document is ignored. Attention finds the document boundaries in
cu_seq_lens, or in the position ids, so that no document sees another.

Shapes: B rows, T tokens of the longest row, S tokens of all rows, D documents.
"""

import copy
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from dft.batching.packing import DOCUMENTS
from dft.constants import IGNORE_INDEX, PADDED_TO


def unpack_rows(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in items of a dataset, where an item of packing.PackedRows holds several and any other is a row."""
    return [row for item in items for row in item.get(DOCUMENTS, [item])]


class PaddingCollator(DataCollatorForSeq2Seq):
    """Pads rows on the right to the longest of the batch, rounded up to a multiple of 8 tokens.

    A batch holds input_ids, attention_mask, labels (-100 on padding) and, if any row has them, loss_weights (float32,
    1 where a row has none); each [B, T]. If rows have a channel (int), the batch holds it as [B].
    """

    def __init__(self, tokenizer):
        tokenizer = copy.copy(tokenizer)  # that of a base model may pad on the left, and is saved as it came
        tokenizer.padding_side = "right"
        super().__init__(tokenizer, pad_to_multiple_of=PADDED_TO)

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        features = unpack_rows(features)
        # transformers' collator pads the columns that it knows; loss_weights is not one
        loss_weights = [row.get("loss_weights") for row in features]
        rows = [{key: value for key, value in row.items() if key != "loss_weights"} for row in features]
        batch = super().__call__(rows, return_tensors)
        if any(weights is not None for weights in loss_weights):
            padded = torch.ones(batch["labels"].shape, dtype=torch.float32)
            for i, weights in enumerate(loss_weights):
                if weights is not None:
                    padded[i, : len(weights)] = torch.as_tensor(weights)
            batch["loss_weights"] = padded
        return batch


class FlatteningCollator:
    """Lays rows one after the other in a single row, without padding.

    A batch holds input_ids, labels, position_ids and, if any row has them, loss_weights (float32, 1 where a row has
    none); each [1, S]. For attention it holds cu_seq_lens_q and cu_seq_lens_k (int32 [D + 1]), max_length_q and
    max_length_k (ints), and use_cache (False, because with a cache transformers doesn't look for document boundaries).
    If rows have a channel (int), the batch holds it as [D].
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = unpack_rows(features)
        lengths = [len(row["input_ids"]) for row in rows]
        boundaries = boundary_arguments(lengths)
        labels = torch.cat([torch.as_tensor(row["labels"]) for row in rows]).long()
        # labels are shifted over the whole row later: the last token of a document must not predict the next document
        labels[boundaries["cu_seq_lens_q"][:-1]] = IGNORE_INDEX
        batch = {
            "input_ids": torch.cat([torch.as_tensor(row["input_ids"]) for row in rows]).long()[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            **boundaries,
            "use_cache": False,
        }
        if any(row.get("loss_weights") is not None for row in rows):
            loss_weights = [
                torch.ones(length) if row.get("loss_weights") is None else torch.as_tensor(row["loss_weights"])
                for row, length in zip(rows, lengths, strict=True)
            ]
            batch["loss_weights"] = torch.cat([weights.float() for weights in loss_weights])[None]
        if "channel" in rows[0]:
            batch["channel"] = torch.tensor([row["channel"] for row in rows])
        return batch


def boundary_arguments(lengths: list[int]) -> dict[str, Any]:
    """The arguments by which transformers' models learn the boundaries of documents of these lengths in one row."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def document_lengths(inputs: dict[str, Any]) -> torch.Tensor:
    """Counts the tokens of each document of a batch: int [D].

    Reads cu_seq_lens, the attention mask or the position ids, whichever `inputs` holds first in this order.
    """
    if "cu_seq_lens_q" in inputs:
        return inputs["cu_seq_lens_q"].diff()
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].sum(1)
    num_rows, length = inputs["input_ids"].shape
    return boundaries_from_positions(inputs.get("position_ids"), num_rows, length, inputs["input_ids"].device).diff()


def token_channels(channel: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Spreads the channel of each document over its tokens: int [D] -> [B, T].

    Args:
        labels: [B, T]; only the shape is used.
        inputs: of the model, which tell documents in one row apart.
    """
    if len(channel) == len(labels) and "cu_seq_lens_q" not in inputs:
        return channel[:, None].expand_as(labels)
    lengths = document_lengths(inputs)
    return torch.repeat_interleave(channel, lengths, output_size=labels.numel()).view_as(labels)


def boundaries_from_positions(
    position_ids: torch.Tensor | None, num_rows: int, length: int, device: torch.device
) -> torch.Tensor:
    """Finds where documents begin in rows [B, T] laid one after the other, and where the last ends: int32 [D + 1].

    A document begins with each row and wherever a position doesn't follow the one before it. Their number depends on
    the values, so this waits for the device.
    """
    begins = torch.zeros(num_rows, length, dtype=torch.bool, device=device)
    begins[:, 0] = True
    if position_ids is not None:
        begins[:, 1:] |= position_ids.diff() != 1
    end = torch.tensor([num_rows * length], device=device)
    return torch.cat([begins.flatten().nonzero().flatten(), end]).int()
