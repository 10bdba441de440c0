"""The weight of a token in the loss: an objective, mixed with plain cross-entropy, without gradient.

    w = alpha * objective + 1 - alpha, and at least the floor

Equation 9 of arXiv 2508.05629 is alpha = 1 with the objective p; plain SFT is alpha = 0.
Shapes: N supervised tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dft.config.loss import LossConfig, check_mixture
from dft.loss.objectives import Dft
from dft.loss.statistics import Needs, TokenStatistics


@dataclass(frozen=True)
class TokenWeight:
    """Computes the weights of tokens.

    Args:
        alpha, floor: see dft.config.loss.LossConfig, which has their defaults and ranges. A floor of 0 is none:
            weights may be negative where the objective is.
        plain_tokens: ids of tokens that always have the weight 1: plain cross-entropy.
        objective: see dft.loss.objectives.

    Raises:
        UserError (a ValueError): one of them is outside its range.
    """

    alpha: float = LossConfig.dft_alpha
    floor: float = LossConfig.dft_floor
    plain_tokens: tuple[int, ...] = ()
    objective: Callable[[TokenStatistics], Tensor] = Dft()

    def __post_init__(self):
        check_mixture(self.alpha, self.floor)

    @property
    def needs(self) -> Needs:
        """What the statistics of a token have to hold."""
        return getattr(self.objective, "needs", Needs())

    @torch.no_grad()
    def __call__(self, tokens: TokenStatistics) -> Tensor:
        """The weights of N tokens, [N] float32, detached.

        Raises:
            ValueError: the objective gives something else than a weight for each token, or needs log-probabilities by
                the starting weights that the rows don't have.
        """
        weights = self._of_objective(tokens)
        if self.alpha != 1.0:
            weights = self.alpha * weights + (1.0 - self.alpha)
        if self.floor > 0:
            weights = weights.clamp(min=self.floor)
        if self.plain_tokens:
            plain = _on_device(self.plain_tokens, tokens.targets.device)
            weights = torch.where(torch.isin(tokens.targets, plain), 1.0, weights)
        return weights

    def _of_objective(self, tokens: TokenStatistics) -> Tensor:
        if self.needs.reference and tokens.reference_log_p is None:
            raise ValueError(
                "the objective needs log-probabilities by the starting weights, and the rows have no column "
                "reference_log_p: DFTTrainer adds it to its own training and evaluation sets"
            )
        weights = self.objective(tokens)
        if not isinstance(weights, Tensor) or weights.shape != tokens.nll.shape:
            given = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
            raise ValueError(f"token_weight must give a weight for each of {len(tokens.nll)} tokens; it gave {given}")
        return weights.detach().float()


@lru_cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids as a tensor, copied once, because a copy to a GPU waits for the work that is queued there."""
    return torch.tensor(ids, device=device)
