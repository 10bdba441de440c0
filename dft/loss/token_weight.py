"""The weight of a token in the DFT loss: a function of the model's own probability of it, without gradient.

    w = max(floor, alpha * p**gamma + 1 - alpha)

Equation 9 of arXiv 2508.05629 is alpha = 1, gamma = 1 and floor = 0; plain SFT is alpha = 0.
Shapes: N supervised tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dft.config.loss import LossConfig, check_weight


@dataclass(frozen=True)
class TokenWeight:
    """Computes max(floor, alpha * p**gamma + 1 - alpha) of tokens.

    Args:
        alpha, gamma, floor: see dft.config.loss.LossConfig, which has their defaults and ranges.
        plain_tokens: ids of tokens that always have the weight 1: plain cross-entropy.

    Raises:
        UserError (a ValueError): one of them is outside its range.
    """

    alpha: float = LossConfig.dft_alpha
    gamma: float = LossConfig.dft_gamma
    floor: float = LossConfig.dft_floor
    plain_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        check_weight(self.alpha, self.gamma, self.floor)

    @torch.no_grad()
    def __call__(self, p_correct: Tensor, targets: Tensor) -> Tensor:
        """The weights, detached, of tokens `targets` [N] with the probabilities `p_correct` [N] -> [N] float32."""
        weights = (self.alpha * p_correct.detach() ** self.gamma + (1.0 - self.alpha)).clamp(min=self.floor)
        if self.plain_tokens:
            plain = _on_device(self.plain_tokens, targets.device)
            weights = torch.where(torch.isin(targets, plain), 1.0, weights)
        return weights


@lru_cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids as a tensor, copied once, because a copy to a GPU waits for the work that is queued there."""
    return torch.tensor(ids, device=device)
