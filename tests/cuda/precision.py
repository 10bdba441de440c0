"""How far results may be from float64: what rounding explains, and no more.

A number that is rounded once changes by at most the unit roundoff of its type, relative to itself: 2**-24 in float32,
2**-8 in bfloat16, 2**-11 in float16. A result that was rounded several times on its way changes by so many unit
roundoffs. Sums over n products of float32 err by about sqrt(n) unit roundoffs, because their errors have random signs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAFETY = 16  # the logits that a softmax exponentiates are up to so large, and it makes their relative errors absolute


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def tolerance(dtype: torch.dtype, roundings: int, terms: int) -> float:
    """The relative error in the norm of results that were rounded to `dtype` so often, and of float32 sums."""
    return roundings * unit_roundoff(dtype) + SAFETY * math.sqrt(terms) * unit_roundoff(torch.float32)


@dataclass(frozen=True)
class Precision:
    """The types that a loss is computed in.

    Attributes:
        held: type of the tensors that the loss gets.
        computed: type that matrix products are computed in, by autocast where it is another one than `held`.
    """

    held: torch.dtype
    computed: torch.dtype

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.computed, enabled=self.held != self.computed)


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "bfloat16 by autocast": Precision(torch.float32, torch.bfloat16),
    "float16 by autocast": Precision(torch.float32, torch.float16),
}


@dataclass
class Reference:
    """The results in float64."""

    loss: Tensor  # scalar
    p_correct: Tensor  # [N]
    entropy: Tensor  # [N]


def reference(logits: Tensor, labels: Tensor, alpha: float, *, is_detached: bool = True, shift: int = 1) -> Reference:
    """The DFT loss, summed over tokens, written out in float64.

    Args:
        logits: [B, T, V] float64.
        labels: [B, T], not shifted.
        is_detached: False for a mutant whose weights have a gradient.
        shift: 0 for a mutant that scores tokens against their own logits.
    """
    targets = labels[:, shift:]
    is_supervised = targets != -100
    log_p = torch.log_softmax(logits[:, : targets.shape[1]][is_supervised], dim=-1)  # [N, V]
    log_p_correct = log_p.gather(1, targets[is_supervised][:, None]).squeeze(1)
    p_correct = log_p_correct.exp()
    weight = alpha * (p_correct.detach() if is_detached else p_correct) + 1 - alpha
    return Reference(-(weight * log_p_correct).sum(), p_correct.detach(), -(log_p.exp() * log_p).sum(1).detach())


MUTANTS = {"weights with a gradient": {"is_detached": False}, "shifted by one": {"shift": 0}}
