"""The DFT loss: cross-entropy weighted by the model's own detached confidence.

    loss = sum_t c_t * w_t * (-log p_t) / N        w_t = max(floor, alpha * sg(p_t)**gamma + 1 - alpha)

p_t is the probability of the correct token, sg the stop-gradient, N the number of supervised tokens and
c_t what the data multiply a token's loss by, 1 if they say nothing. With gamma 1 and floor 0, alpha = 0 is
plain SFT and alpha = 1 is equation 9 of "On the Generalization of SFT: A Reinforcement Learning Perspective
with Reward Rectification" (arXiv 2508.05629).

This file computes the loss from logits, to be read and compared with; fused.py computes the same without holding
logits. The weight w is in token_weight.py.

Shapes: B batch, T tokens, V vocabulary, N supervised tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dft.config.loss import Normalization
from dft.constants import IGNORE_INDEX
from dft.loss.token_weight import TokenWeight

ENTROPY_ROWS = 64  # rows whose V terms are held at once


@dataclass
class TokenStatistics:
    """Per-token results of the model on N supervised tokens, each of shape [N]."""

    targets: Tensor  # the correct tokens, int64
    nll: Tensor  # -log p of the correct token, float32
    p_correct: Tensor  # probability of the correct token, float32, detached
    is_top1: Tensor  # whether no other token is likelier, bool
    entropy: Tensor | None = None  # of the distribution over the vocabulary, in nats, float32; where it was asked for
    places: Tensor | None = None  # in the flattened batch, of what predicts them, int64


def shift_labels(labels: Tensor) -> Tensor:
    """Aligns labels with the logits that predict them: position t is scored against token t + 1.

    labels [B, T] -> [B, T]; the last position predicts nothing and is ignored.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def count_terms(labels: Tensor, normalization: Normalization = "token") -> Tensor:
    """The divisor of a loss: the number of supervised tokens of `labels` [B, T], or of assistant turns; int64 scalar.

    A turn is an unbroken run of supervised tokens. The first token of a row is not counted, since nothing predicts it.
    """
    supervised = shift_labels(labels) != IGNORE_INDEX
    return supervised.sum() if normalization == "token" else _starts_turn(supervised).sum()


def _starts_turn(supervised: Tensor) -> Tensor:
    """The first supervised position of each turn, [B, T] bool -> [B, T] bool.

    The last position of a row is never supervised, so no turn runs on into the next row.
    """
    return supervised & ~torch.roll(supervised.flatten(), 1).view_as(supervised)


def loss_weight_of_tokens(
    labels: Tensor, loss_weights: Tensor | None = None, normalization: Normalization = "token"
) -> Tensor | None:
    """The factor c of each supervised token, [N] float32, in the order of `token_statistics`; None if all are 1.

    Args:
        labels: [B, T], not shifted.
        loss_weights: [B, T], aligned with `labels`: what the data multiply each token's loss by.
        normalization: turn divides the loss of each token by the number of tokens of its turn.
    """
    supervised = shift_labels(labels) != IGNORE_INDEX
    loss_weight = None if loss_weights is None else torch.roll(loss_weights, -1, dims=-1)[supervised].float()
    if normalization == "turn":
        turn = torch.cumsum(_starts_turn(supervised).flatten(), 0)[supervised.flatten()] - 1  # [N], 0, 0, 1, 1, 1, …
        per_token = 1.0 / torch.bincount(turn)[turn].float()
        loss_weight = per_token if loss_weight is None else loss_weight * per_token
    return loss_weight


def token_statistics(logits: Tensor, targets: Tensor, with_entropy: bool = False) -> TokenStatistics:
    """Scores N tokens. logits [N, V] in any float type, targets [N].

    Without any token the results are empty but still connected to `logits`, so that backward runs and
    distributed gradient hooks fire.
    """
    logits = logits.float()
    of_target = logits.gather(-1, targets[:, None]).squeeze(-1)  # [N]
    nll = torch.logsumexp(logits, dim=-1) - of_target
    with torch.no_grad():
        entropy = entropy_of(logits) if with_entropy else None
        return TokenStatistics(targets, nll, torch.exp(-nll), of_target >= logits.amax(-1), entropy)


def entropy_of(logits: Tensor) -> Tensor:
    """-sum(p log p) of logits [N, V] -> [N], in nats; a few rows at a time, because its terms take memory too."""
    chunks = logits.split(ENTROPY_ROWS)
    return torch.cat([torch.special.entr(torch.softmax(chunk, dim=-1)).sum(-1) for chunk in chunks])


def supervised_rows(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `values` [B, T, X] that predict the supervised tokens of `labels` [B, T], not shifted.

    Returns:
        those rows, [N, X]; the tokens that they predict, [N]; and the rows' flat indices in the batch, [N]. Finding
        these makes the host wait for the device, because N depends on the labels.
    """
    targets = shift_labels(labels).flatten()
    places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return values.flatten(0, 1)[places], targets[places], places


def weighted_sum(tokens: TokenStatistics, token_weight: TokenWeight, loss_weight: Tensor | None) -> Tensor:
    """sum of c * w * nll over tokens, a scalar; c is `loss_weight` [N], or 1."""
    losses = token_weight(tokens.p_correct, tokens.targets) * tokens.nll
    return (losses if loss_weight is None else losses * loss_weight).sum()


def dft_loss_sum(
    logits: Tensor,
    labels: Tensor,
    token_weight: TokenWeight,
    loss_weight: Tensor | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, TokenStatistics]:
    """The DFT loss of one micro-batch, summed over its tokens and not yet divided by anything.

    The caller divides by `count_terms` of the *global* batch (all micro-batches of the step on all
    ranks); a mean taken here would weigh tokens by the micro-batch they fall in.

    Args:
        logits: [B, T, V]. Only supervised rows are upcast to float32.
        labels: [B, T], -100 where nothing is supervised; not shifted.
        loss_weight: [N], see `loss_weight_of_tokens`.
        with_entropy: compute the entropy of each token too.

    Returns:
        sum of c * w * nll (scalar, float32) and the statistics of the tokens it sums over.
    """
    rows, targets, places = supervised_rows(logits, labels)  # [N, V], [N]
    tokens = replace(token_statistics(rows, targets, with_entropy), places=places)
    return weighted_sum(tokens, token_weight, loss_weight), tokens
