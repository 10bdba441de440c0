"""The DFT loss: cross-entropy weighted by the model's own detached confidence.

    loss = sum_t w_t * (-log p_t) / N        w_t = alpha * sg(p_t) + (1 - alpha)

p_t is the probability of the correct token, sg the stop-gradient, N the number of supervised tokens.
alpha = 0 is plain SFT; alpha = 1 is equation 9 of "On the Generalization of SFT: A Reinforcement
Learning Perspective with Reward Rectification" (arXiv 2508.05629).

Shapes: B batch, T tokens, V vocabulary, N supervised tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class TokenStatistics:
    """Per-token results of the model on N supervised tokens, of shape [N] unless they say otherwise."""

    nll: Tensor  # -log p of the correct token, float32, with gradient
    p_correct: Tensor  # probability of the correct token, float32, detached
    is_top1: Tensor  # whether the arg-max is the correct token, bool
    supervised: Tensor  # [B, T], bool: the positions that predict these tokens


def shift_labels(labels: Tensor) -> Tensor:
    """Aligns labels with the logits that predict them: position t is scored against token t + 1.

    labels [B, T] -> [B, T]; the last position predicts nothing and is ignored.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def count_supervised(labels: Tensor) -> Tensor:
    """Number of tokens of `labels` [B, T] that are predicted by some position, as an int64 scalar."""
    return (labels[..., 1:] != IGNORE_INDEX).sum()


def token_statistics(logits: Tensor, labels: Tensor) -> TokenStatistics:
    """Scores every supervised token. logits [B, T, V] in any float type, labels [B, T] not shifted.

    Only supervised rows are upcast to float32. Without any, the results are empty but still connected
    to `logits`, so that backward runs and distributed gradient hooks fire.
    """
    targets = shift_labels(labels)
    supervised = targets != IGNORE_INDEX
    rows = logits[supervised].float()  # [N, V]
    targets = targets[supervised]  # [N]
    nll = torch.logsumexp(rows, dim=-1) - rows.gather(-1, targets[:, None]).squeeze(-1)  # [N]
    with torch.no_grad():
        return TokenStatistics(nll, torch.exp(-nll), rows.argmax(-1) == targets, supervised)


def dft_weight(p_correct: Tensor, alpha: float) -> Tensor:
    """The weight alpha * p + (1 - alpha) of each token, detached. p_correct [N] -> [N]."""
    return (alpha * p_correct + (1.0 - alpha)).detach()


def dft_loss_sum(
    logits: Tensor, labels: Tensor, alpha: float, loss_weights: Tensor | None = None
) -> tuple[Tensor, TokenStatistics]:
    """The DFT loss of one micro-batch, summed over its tokens and not yet divided by anything.

    The caller divides by the number of supervised tokens in the *global* batch (all micro-batches of
    the step on all ranks); a mean taken here would weigh tokens by the micro-batch they fall in.

    Args:
        logits: [B, T, V].
        labels: [B, T], -100 where nothing is supervised; not shifted.
        alpha: share of the confidence in the weight, from 0 (SFT) to 1 (pure DFT).
        loss_weights: [B, T], aligned with `labels`: what the data say each token's loss is multiplied
            by; None for 1. The number of tokens to divide by doesn't change with it.

    Returns:
        sum of w * nll (scalar, float32) and the statistics of the tokens it sums over.
    """
    tokens = token_statistics(logits, labels)
    losses = dft_weight(tokens.p_correct, alpha) * tokens.nll  # [N]
    if loss_weights is not None:
        losses = losses * torch.roll(loss_weights, -1, dims=-1)[tokens.supervised]
    return losses.sum(), tokens
