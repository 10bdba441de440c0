"""Stop a run whose weights are NaN or infinite before they are saved as if they were a model."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dft.distributed import gather_in_training

MAX_NAMED = 3


def check_finite(model: nn.Module, step: int) -> None:
    """Looks at the trained weights, each rank at those that it holds: at all once, with one wait for the device.

    Frozen ones don't change, and those in 4 bits may be stored in numbers whose bits mean something else. All ranks
    must call it together.

    Raises:
        FloatingPointError: on all ranks, if some are NaN or infinite on any.
    """
    shards = {name: shard_of(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    shards = {name: x for name, x in shards.items() if x.is_floating_point() and x.numel()}
    largest = [torch.linalg.vector_norm(x, math.inf, dtype=torch.float32) for x in shards.values()]
    numbers = torch.stack([x.to(largest[0].device) for x in largest]).tolist() if largest else []
    mine = [name for name, number in zip(shards, numbers, strict=True) if not math.isfinite(number)]
    names = list(dict.fromkeys(name for of_rank in gather_in_training(mine) for name in of_rank))
    if names:
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        raise FloatingPointError(
            f"weights are NaN or infinite after step {step}: {', '.join(names[:MAX_NAMED])}{more}. They are not "
            "saved. Go on from the last checkpoint with a lower --learning_rate, or a --max_grad_norm"
        )


def shard_of(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: under ZeRO-3 and FSDP a part, else all of it."""
    if hasattr(parameter, "ds_tensor"):  # DeepSpeed's, of ZeRO-3
        return parameter.ds_tensor.detach()
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
