"""Find a loss that is NaN or infinite before the update, and name the rows that it came from."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from dft.batching.collators import document_lengths
from dft.batching.packing import PackedRows
from dft.distributed import gather_in_training
from dft.nonfinite import NonfiniteSteps
from dft.stopping import StopRequest

MAX_NAMED = 20  # rows in the error message


class FiniteCheck:
    """Looks at the losses of a step's micro-batches on all ranks, before the backward pass of the last one.

    DeepSpeed changes the weights inside that backward pass: afterwards it would be too late. The same collective tells
    all ranks whether one of them was asked to stop.

    Args:
        dataset: the training rows, to find a batch's rows in.
        source_of: where a row of it comes from, in words; by default its index.
        stop: whose `agreed` becomes the greatest `wanted` of all ranks.
        nonfinite: decides what happens; by default the run ends.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        source_of: Callable[[int], str] | None = None,
        stop: StopRequest | None = None,
        nonfinite: NonfiniteSteps | None = None,
    ):
        self._nonfinite = nonfinite or NonfiniteSteps()
        self._stop = stop or StopRequest()
        self._dataset = dataset.rows if isinstance(dataset, PackedRows) else dataset
        self._source_of = source_of or (lambda index: f"row {index} of the training set")
        self._noted: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._num_left = 0  # micro-batches of the step that are still to come

    def begin(self, num_batches: int) -> None:
        """The start of a step of so many micro-batches."""
        self._noted = []
        self._num_left = num_batches

    def note(self, loss: Tensor, inputs: dict[str, Tensor], step: int) -> Tensor:
        """Takes in a micro-batch of a step that was begun; with the last one, a collective, it checks the step.

        Args:
            loss: scalar.
            inputs: of the model, to tell the rows by.
            step: counted from 1.

        Returns:
            The loss; NaN where the update is to be skipped, so that every engine finds a gradient that isn't finite.

        Raises:
            FloatingPointError: on every rank, if a loss noted on any of them is NaN or infinite, and none is skipped.
        """
        if self._num_left == 0:  # a loss that train() didn't ask for
            return loss
        self._noted.append((loss.detach(), inputs))
        self._num_left -= 1
        if self._num_left == 0 and self._is_bad(step):
            return loss * math.nan
        return loss

    def _is_bad(self, step: int) -> bool:
        is_bad = ~torch.isfinite(torch.stack([loss for loss, _ in self._noted]))
        any_bad = is_bad.any().int()
        worst = torch.stack([any_bad, torch.full_like(any_bad, self._stop.wanted)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        any_bad, self._stop.agreed = worst.tolist()
        if not any_bad:
            return False
        sources = [self._sources(inputs) for bad, (_, inputs) in zip(is_bad, self._noted, strict=True) if bad]
        batches = [batch for of_rank in gather_in_training(sources) for batch in of_rank]
        names = list(dict.fromkeys(name for batch in batches for name in batch))
        listed = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if names[MAX_NAMED:] else "")
        self._nonfinite.take_bad_loss(
            f"the loss is NaN or infinite in step {step}. The rows of its batch: {listed}.",
            "Look at them, lower --learning_rate, or train in bfloat16 or float32 instead of float16",
        )
        return True

    def _sources(self, inputs: dict[str, Tensor]) -> list[str]:
        """Where the rows of a batch come from: the first rows of the dataset with the same tokens."""
        wanted = _rows(inputs)
        found: dict[int, str] = {}
        for index in range(len(self._dataset) if hasattr(self._dataset, "__len__") else 0):
            row = list(self._dataset[index]["input_ids"])
            for place, ids in enumerate(wanted):
                if place not in found and ids == row:
                    found[place] = self._source_of(index)
            if len(found) == len(wanted):
                break
        return [found.get(place, "a row that is not in the training set") for place in range(len(wanted))]


def _rows(inputs: dict[str, Tensor]) -> list[list[int]]:
    """The tokens of each row of a batch, without padding."""
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None:
        return [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
    return [ids.tolist() for ids in input_ids.flatten().split(document_lengths(inputs).tolist())]
