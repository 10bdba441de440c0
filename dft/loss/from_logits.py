"""The DFT loss: cross-entropy weighted by the model's own detached confidence.

    loss = sum_t c_t * w_t * (-log p_t) / N        w_t = alpha * sg(p_t) + 1 - alpha

p_t is the probability of the correct token, sg the stop-gradient, N the number of supervised tokens and
c_t what the data multiply a token's loss by, 1 if they say nothing. alpha = 0 is plain SFT and alpha = 1 is
equation 9 of "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification"
(arXiv 2508.05629). Other weights w are in objectives.py, and how they are mixed in token_weight.py.

This file computes the loss from logits, to be read and compared with; fused.py computes the same without holding
logits.

Shapes: B batch, T tokens, V vocabulary, N supervised tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dft.config.loss import Normalization
from dft.constants import IGNORE_INDEX
from dft.loss.statistics import Needs, TokenStatistics, token_statistics
from dft.loss.token_weight import TokenWeight


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
    """The factor c of each supervised token, [N] float32, in the order of `supervised_rows`; None if all are 1.

    Args:
        labels: [B, T], not shifted.
        loss_weights: [B, T], aligned with `labels`: what the data multiply each token's loss by.
        normalization: turn divides the loss of each token by the number of tokens of its turn.
    """
    supervised = shift_labels(labels) != IGNORE_INDEX
    loss_weight = None if loss_weights is None else values_of_tokens(loss_weights, labels)
    if normalization == "turn":
        turn = torch.cumsum(_starts_turn(supervised).flatten(), 0)[supervised.flatten()] - 1  # [N], 0, 0, 1, 1, 1, …
        per_token = 1.0 / torch.bincount(turn)[turn].float()
        loss_weight = per_token if loss_weight is None else loss_weight * per_token
    return loss_weight


def values_of_tokens(values: Tensor, labels: Tensor) -> Tensor:
    """The values [B, T] of the supervised tokens of `labels` [B, T], neither of them shifted: [N] float32."""
    return torch.roll(values, -1, dims=-1)[shift_labels(labels) != IGNORE_INDEX].float()


def supervised_rows(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `values` [B, T, X] that predict the supervised tokens of `labels` [B, T], not shifted.

    Where a row goes on elsewhere, `labels` are [B, T + 1]: the last of them is what the last position predicts.

    Returns:
        those rows, [N, X]; the tokens that they predict, [N]; and the rows' flat indices in the batch, [N]. Finding
        these makes the host wait for the device, because N depends on the labels.
    """
    targets = shift_labels(labels)[:, : values.shape[1]].flatten()
    places = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return values.flatten(0, 1)[places], targets[places], places


@dataclass(frozen=True)
class TokenData:
    """What is known of each supervised token before the model sees it; each [N] float32, or None.

    Attributes:
        loss_weight: the factor c, see `loss_weight_of_tokens`; None for 1.
        reference_log_p: log p of the token by the starting weights.
    """

    loss_weight: Tensor | None = None
    reference_log_p: Tensor | None = None

    def __getitem__(self, chunk: slice) -> "TokenData":
        """That of some of the tokens."""
        values = (self.loss_weight, self.reference_log_p)
        return TokenData(*(None if value is None else value[chunk] for value in values))


NO_DATA = TokenData()


def weigh(tokens: TokenStatistics, token_weight: TokenWeight, data: TokenData) -> Tensor:
    """Fills in the weights w of tokens and returns the factors c * w of their nll, [N]."""
    tokens.reference_log_p = data.reference_log_p
    tokens.weight = token_weight(tokens)
    return tokens.weight if data.loss_weight is None else tokens.weight * data.loss_weight


def dft_loss_sum(
    logits: Tensor,
    labels: Tensor,
    token_weight: TokenWeight,
    data: TokenData = NO_DATA,
    needs: Needs | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """The DFT loss of one micro-batch, summed over its tokens and not yet divided by anything.

    The caller divides by `count_terms` of the *global* batch (all micro-batches of the step on all
    ranks); a mean taken here would weigh tokens by the micro-batch they fall in.

    Args:
        logits: [B, T, V]. Only supervised rows are upcast to float32.
        labels: [B, T], -100 where nothing is supervised; not shifted.
        needs: what the statistics have to hold; by default what the weight needs.

    Returns:
        sum of c * w * nll (scalar, float32) and the statistics of the tokens it sums over.
    """
    rows, targets, places = supervised_rows(logits, labels)  # [N, V], [N]
    tokens = token_statistics(rows, targets, needs or token_weight.needs)
    factors = weigh(tokens, token_weight, data)
    return (factors * tokens.nll).sum(), replace(tokens, places=places)
