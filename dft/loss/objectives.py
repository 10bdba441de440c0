"""The weights of the DFT family: functions of what the model says of a token, without gradient.

Each says what it needs to know of a token besides p, the probability of the correct one, and maps statistics of N
tokens to weights [N] float32. Parameters and their defaults are in dft/config/objectives.py. docs/objectives.md says
what each is for.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dft.config.loss import LossConfig
from dft.loss.statistics import Needs, TokenStatistics


class Objective(Protocol):
    """A weight. Any function of TokenStatistics is one too; without `needs` it needs p alone."""

    needs: Needs

    def __call__(self, tokens: TokenStatistics) -> Tensor: ...


@dataclass(frozen=True)
class Dft:
    """p**gamma: equation 9 of arXiv 2508.05629 at gamma 1; the family of arXiv 2510.00526 otherwise."""

    gamma: float = 1.0
    needs = Needs()

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return tokens.p_correct**self.gamma


@dataclass(frozen=True)
class Sft:
    """1: cross-entropy."""

    needs = Needs()

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return torch.ones_like(tokens.p_correct)


@dataclass(frozen=True)
class Threshold:
    """p**power where p >= tau, else 0: at power 0 ProFit (arXiv 2601.09195), at 1 its DFT form (arXiv 2510.00526)."""

    tau: float
    power: float
    needs = Needs()

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return torch.where(tokens.p_correct >= self.tau, tokens.p_correct**self.power, 0.0)


@dataclass(frozen=True)
class Eaft:
    """(H_k / scale)**exponent; H_k is the entropy of the k likeliest tokens among themselves, in nats.

    Equations 2 and 3 of arXiv 2601.02151, whose scale is log(k).
    """

    exponent: float
    top_k: int
    scale: float

    @property
    def needs(self) -> Needs:
        return Needs(top_k=self.top_k)

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return (tokens.top_entropy / self.scale) ** self.exponent


@dataclass(frozen=True)
class Deft:
    """p**a with a = sum over the vocabulary of p_v**2: 1 where the model is sure, near 0 where it is not.

    As github.com/luludus/DEFT computes it (arXiv 2602.11424).
    """

    needs = Needs(concentration=True)

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return tokens.p_correct**tokens.concentration


@dataclass(frozen=True)
class Idft:
    """p**g with g = clip(exp(-(log p + H) / temperature), low, high).

    log p + H is 0 on average for what the model itself writes, and below 0 where p is less than the entropy promises.
    As github.com/zhangmiaosen2000/Towards-On-Policy-SFT computes it (arXiv 2602.12222).
    """

    temperature: float
    low: float
    high: float
    needs = Needs(entropy=True)

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        power = torch.exp((tokens.nll - tokens.entropy) / self.temperature).clamp(self.low, self.high)
        return torch.exp(-power * tokens.nll)


@dataclass(frozen=True)
class Talr:
    """max(p**(1/tau), least), after arXiv 2509.20758; tau is given by a Temperature, see temperature.py."""

    tau: float
    least: float
    needs = Needs()

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return torch.exp(-tokens.nll / self.tau).clamp(min=self.least)


@dataclass(frozen=True)
class Chord:
    """p * (1 - p): most for tokens that the model neither expects nor rules out (CHORD, arXiv 2508.11408)."""

    needs = Needs()

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return tokens.p_correct * -torch.expm1(-tokens.nll)


@dataclass(frozen=True)
class Prior:
    """p_ref: the weights that the training began with say how much a token counts (PriFT, arXiv 2606.09396)."""

    needs = Needs(reference=True)

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return torch.exp(tokens.reference_log_p)


@dataclass(frozen=True)
class Anchored:
    """p + strength * (min(r, max_ratio) - 1) with r = p_ref / p.

    The gradient of sg(p) * nll + strength * k3, where k3 = r - log r - 1 estimates the divergence from the starting
    weights on the correct token alone, and d k3 / d nll = r - 1. A weight may be negative: it then makes a token less
    likely of which the model is surer than the starting weights were. After pull request 3302 of NVIDIA-NeMo/RL.
    """

    strength: float
    max_ratio: float
    needs = Needs(reference=True)

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        ratio = torch.exp(tokens.reference_log_p + tokens.nll).clamp(max=self.max_ratio)
        return tokens.p_correct + self.strength * (ratio - 1.0)

    def is_clipped(self, tokens: TokenStatistics) -> Tensor:
        """Which ratios are cut, [N] bool."""
        return torch.exp(tokens.reference_log_p + tokens.nll) > self.max_ratio


@dataclass(frozen=True)
class Importance:
    """clip(p / p_ref, low, high): the importance weight of a token, as in arXiv 2507.12856 for each step."""

    low: float
    high: float
    needs = Needs(reference=True)

    def __call__(self, tokens: TokenStatistics) -> Tensor:
        return self._ratio(tokens).clamp(self.low, self.high)

    def is_clipped(self, tokens: TokenStatistics) -> Tensor:
        """Which ratios are cut, [N] bool."""
        ratio = self._ratio(tokens)
        return (ratio < self.low) | (ratio > self.high)

    def _ratio(self, tokens: TokenStatistics) -> Tensor:
        return torch.exp(-tokens.nll - tokens.reference_log_p)


OBJECTIVES = {
    "sft": Sft,
    "threshold": Threshold,
    "eaft": Eaft,
    "deft": Deft,
    "idft": Idft,
    "talr": Talr,
    "chord": Chord,
    "prior": Prior,
    "anchored": Anchored,
    "importance": Importance,
}


def make_objective(config: LossConfig) -> Objective:
    """The objective that a configuration names."""
    if config.objective == "dft":
        return Dft(config.dft_gamma)
    return OBJECTIVES[config.objective](**config.objective_arguments)
