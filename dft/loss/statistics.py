"""What a model says of single tokens: of the correct one, and of the whole distribution where a weight needs it.

Shapes: N supervised tokens, V vocabulary.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 64  # rows whose V terms are held at once


@dataclass(frozen=True)
class Needs:
    """What has to be known of a token besides the probability of the correct one.

    Attributes:
        entropy: of the distribution.
        concentration: the sum of its squared probabilities.
        top_k: number of likeliest tokens whose entropy among themselves is wanted; 0 for none.
        reference: log p of the correct token by the weights that the training began with.
    """

    entropy: bool = False
    concentration: bool = False
    top_k: int = 0
    reference: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        """What either of them needs; of two numbers of likeliest tokens, the one that isn't 0."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Needs(*(mine or theirs for mine, theirs in pairs))


@dataclass
class TokenStatistics:
    """Per-token results of the model on N supervised tokens, each of shape [N]; None for what nobody needs."""

    targets: Tensor  # the correct tokens, int64
    nll: Tensor  # -log p of the correct token, float32
    p_correct: Tensor  # probability of the correct token, float32, detached
    is_top1: Tensor  # whether no other token is likelier, bool
    entropy: Tensor | None = None  # of the distribution over the vocabulary, in nats, float32
    concentration: Tensor | None = None  # sum of p**2 over the vocabulary, float32
    top_entropy: Tensor | None = None  # of the likeliest tokens among themselves, in nats, float32
    reference_log_p: Tensor | None = None  # log p of the correct token by the starting weights, float32
    weight: Tensor | None = None  # in the loss, float32, detached
    places: Tensor | None = None  # in the flattened batch, of what predicts them, int64


def token_statistics(logits: Tensor, targets: Tensor, needs: Needs = Needs()) -> TokenStatistics:
    """Scores N tokens. logits [N, V] in any float type, targets [N].

    Without any token the results are empty but still connected to `logits`, so that backward runs and
    distributed gradient hooks fire.
    """
    logits = logits.float()
    of_target = logits.gather(-1, targets[:, None]).squeeze(-1)  # [N]
    nll = torch.logsumexp(logits, dim=-1) - of_target
    with torch.no_grad():
        tokens = TokenStatistics(targets, nll, torch.exp(-nll), of_target >= logits.amax(-1))
        if needs.top_k:
            tokens.top_entropy = top_entropy_of(logits, needs.top_k)
        few = logits.split(ROWS_AT_ONCE)
        if needs.entropy:
            tokens.entropy = torch.cat([entropy_of(torch.softmax(rows, dim=-1)) for rows in few])
        if needs.concentration:
            tokens.concentration = torch.cat([concentration_of(torch.softmax(rows, dim=-1)) for rows in few])
        return tokens


def entropy_of(probabilities: Tensor) -> Tensor:
    """-sum(p log p), in nats: [N, V] -> [N]."""
    return torch.special.entr(probabilities).sum(-1)


def concentration_of(probabilities: Tensor) -> Tensor:
    """sum(p**2): [N, V] -> [N]."""
    return torch.linalg.vecdot(probabilities, probabilities)


def top_entropy_of(logits: Tensor, top_k: int) -> Tensor:
    """The entropy of the `top_k` likeliest tokens among themselves, in nats: logits [N, V] -> [N]."""
    likeliest = logits.topk(min(top_k, logits.shape[-1]), dim=-1, sorted=False).values
    return entropy_of(torch.softmax(likeliest, dim=-1))
