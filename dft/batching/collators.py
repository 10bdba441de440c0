"""Rows to batches: padded, or one after the other without padding.

Without padding a batch is one row [1, S] of several documents. Positions start anew with each, there is no
attention mask, and the first label of each is ignored. Attention takes the borders from cu_seq_lens, or from the
positions, so that no document sees another.
"""

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

from dft.batching.packing import DOCUMENTS, PADDED_TO
from dft.labels import IGNORE_INDEX


def documents(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a batch, those of packing.PackedRows taken apart."""
    return [row for item in items for row in item.get(DOCUMENTS, [item])]


class PaddingCollator(DataCollatorForSeq2Seq):
    """Pads rows to the longest of a batch, on the right, to a multiple of 8 tokens.

    A batch holds input_ids, attention_mask, labels (-100 on padding) and, where the rows have them,
    loss_weights (float32); each [B, T]. Where rows have a channel (int), it is kept as [B].
    """

    def __init__(self, tokenizer):
        super().__init__(tokenizer, pad_to_multiple_of=PADDED_TO)

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> dict[str, torch.Tensor]:
        features = documents(features)
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


class FlatteningCollator:
    """Puts rows one after the other into a single row, without padding.

    A batch holds input_ids, labels, position_ids and, where a row has them, loss_weights, each [1, S]; and for
    attention cu_seq_lens_q and cu_seq_lens_k, int32 [documents + 1], max_length_q and max_length_k, ints, and
    use_cache, False: with a cache transformers doesn't look for borders. Where rows have a channel (int), it is
    kept as [documents].
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        rows = documents(features)
        lengths = [len(row["input_ids"]) for row in rows]
        borders = border_arguments(lengths)
        labels = torch.cat([torch.as_tensor(row["labels"]) for row in rows]).long()
        labels[borders["cu_seq_lens_q"][:-1]] = IGNORE_INDEX  # nothing predicts the first token of a document
        batch = {
            "input_ids": torch.cat([torch.as_tensor(row["input_ids"]) for row in rows]).long()[None],
            "labels": labels[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            **borders,
            "use_cache": False,
        }
        if any(row.get("loss_weights") is not None for row in rows):
            weights = [
                row["loss_weights"] if row.get("loss_weights") is not None else [1.0] * n
                for row, n in zip(rows, lengths, strict=True)
            ]
            batch["loss_weights"] = torch.cat([torch.as_tensor(some, dtype=torch.float32) for some in weights])[None]
        if "channel" in rows[0]:
            batch["channel"] = torch.tensor([row["channel"] for row in rows])
        return batch


def border_arguments(lengths: list[int]) -> dict[str, Any]:
    """What transformers' models take to know where documents of these lengths begin."""
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def document_lengths(inputs: dict[str, Any]) -> torch.Tensor:
    """The tokens of each document of a batch, [documents]: from its borders, its attention mask or its positions."""
    if "cu_seq_lens_q" in inputs:
        return inputs["cu_seq_lens_q"].diff()
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].sum(1)
    rows, length = inputs["input_ids"].shape
    return borders_of_positions(inputs.get("position_ids"), rows, length, inputs["input_ids"].device).diff()


def token_channels(channel: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """The channel of each position, [B, T], from that of each document of a batch, [documents].

    Args:
        labels: [B, T].
        inputs: of the model; what tells documents of one row apart.
    """
    if len(channel) == len(labels) and "cu_seq_lens_q" not in inputs:
        return channel[:, None].expand_as(labels)
    lengths = document_lengths(inputs)
    return torch.repeat_interleave(channel, lengths, output_size=labels.numel()).view_as(labels)


def borders_of_positions(
    position_ids: torch.Tensor | None, rows: int, length: int, device: torch.device
) -> torch.Tensor:
    """Where documents begin in rows [B, T] put one after the other, and the end: int32 [documents + 1].

    A document begins where positions don't go on, or with a row. Waits for the device.
    """
    begins = torch.zeros(rows, length, dtype=torch.bool, device=device)
    begins[:, 0] = True
    if position_ids is not None:
        begins[:, 1:] |= position_ids.diff() != 1
    end = torch.tensor([rows * length], device=device)
    return torch.cat([begins.flatten().nonzero().flatten(), end]).int()
