"""Stops a run at the first loss that is NaN or infinite, and says which rows it came from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

MAX_NAMED = 20  # rows


class FiniteCheck:
    """Looks at the loss of every micro-batch without waiting for it.

    Args:
        dataset: the training rows, to find a batch's rows in.
        source_of: where a row of it comes from, in words; by default its index.
    """

    def __init__(self, dataset: Dataset | None, source_of: Callable[[int], str] | None = None):
        self._dataset = dataset
        self._source_of = source_of or (lambda index: f"row {index} of the training set")
        self._waiting: list[tuple[Tensor, Any, Tensor]] = []  # is it finite, when that is known, input_ids

    def add(self, loss_sum: Tensor, input_ids: Tensor) -> None:
        """Notes the loss of a micro-batch with these rows [B, T]."""
        is_finite, event = torch.isfinite(loss_sum.detach()), None
        if loss_sum.is_cuda:
            on_device, event = is_finite, torch.cuda.Event()
            is_finite = torch.empty((), dtype=torch.bool, pin_memory=True)
            is_finite.copy_(on_device, non_blocking=True)
            event.record()
        self._waiting.append((is_finite, event, input_ids))

    def stop(self, step: int) -> None:
        """Raises FloatingPointError if a loss noted since the last call is not finite.

        A GPU has its backward pass still to do while this waits for the forward pass.
        """
        waiting, self._waiting = self._waiting, []
        for is_finite, event, input_ids in waiting:
            if event is not None:
                event.synchronize()
            if not is_finite:
                raise FloatingPointError(
                    f"the loss is NaN or infinite in step {step}. The rows of its batch: {self._rows(input_ids)}. "
                    "Look at them (--dry_run True shows samples), lower --learning_rate, or train in bfloat16 or "
                    "float32 instead of float16"
                )

    def _rows(self, input_ids: Tensor) -> str:
        """Where rows come from; padding behind them doesn't matter."""
        wanted = [row.tolist() for row in input_ids]
        found: dict[int, str] = {}
        for index in range(len(self._dataset) if hasattr(self._dataset, "__len__") else 0):
            row = list(self._dataset[index]["input_ids"])
            for place, ids in enumerate(wanted):
                if place not in found and ids[: len(row)] == row:
                    found[place] = self._source_of(index)
        named = [found.get(place, "a row that is not in the training set") for place in range(len(wanted))]
        return ", ".join(named[:MAX_NAMED]) + (f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else "")
