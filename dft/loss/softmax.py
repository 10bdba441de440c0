"""What is asked of the softmax of logits, and the gradient of nll, without a copy of the logits.

Shapes: C rows, V vocabulary.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from dft.loss.statistics import Needs, TokenStatistics, concentration_of, token_statistics, top_entropy_of

ROWS_IN_CACHE = 16  # of logits, which a processor reads again before it forgets them
LEAST_LOGIT = -200.0  # below the greatest one: its exponential is 0 in float32


def softmax_gradient_(z: Tensor, targets: Tensor, out: Tensor | None, needs: Needs) -> TokenStatistics:
    """Statistics of float32 logits z [C, V]; softmax(z) - onehot(targets) is written to `out`.

    Args:
        out: [C, V] in any float type, or z itself, or None if the gradient isn't wanted. If it is given, z is
            overwritten in any case.
    """
    if z.is_cuda and find_spec("triton"):
        return _by_kernel(z, targets, out, needs)
    if out is None:
        return token_statistics(z, targets, needs)
    tokens = _in_place(z, targets, needs)
    if out is not z:
        out.copy_(z)
    return tokens


def _by_kernel(z: Tensor, targets: Tensor, out: Tensor | None, needs: Needs) -> TokenStatistics:
    from dft.loss.softmax_kernel import softmax_gradient

    top_entropy = top_entropy_of(z, needs.top_k) if needs.top_k else None
    return replace(softmax_gradient(z, targets, out, needs), top_entropy=top_entropy)


def _in_place(z: Tensor, targets: Tensor, needs: Needs) -> TokenStatistics:
    """Two passes over the logits: one for the greatest, one for the softmax, whose kernel keeps a row in the cache.

    What the distribution is asked for is read from rows that are in the cache still.
    """
    index = targets[:, None]
    of_target = z.gather(-1, index).squeeze(-1)
    top_entropy = top_entropy_of(z, needs.top_k) if needs.top_k else None
    top, place = z.max(dim=-1)
    entropy = torch.empty_like(top) if needs.entropy else None
    concentration = torch.empty_like(top) if needs.concentration else None
    few_rows = ROWS_IN_CACHE if needs.entropy or needs.concentration else max(len(z), 1)
    for start in range(0, len(z), few_rows):
        few = slice(start, start + few_rows)
        if entropy is None:
            torch.softmax(z[few], dim=-1, out=z[few])
        else:
            entropy[few] = _softmax_with_entropy_(z[few], top[few])
        if concentration is not None:
            concentration[few] = concentration_of(z[few])
    # the softmax of the greatest logit is 1 / sum(exp(z - top)); that of the target's may underflow
    nll = top - of_target - torch.log(z.gather(-1, place[:, None]).squeeze(-1))
    z.scatter_add_(-1, index, torch.full_like(index, -1, dtype=z.dtype))
    return TokenStatistics(targets, nll, torch.exp(-nll), of_target >= top, entropy, concentration, top_entropy)


def _softmax_with_entropy_(z: Tensor, top: Tensor) -> Tensor:
    """The entropy [C] of logits z [C, V], which become their softmax, without a logarithm of each probability.

    With the greatest logit, top [C], taken off: entropy = log sum(exp(z)) - sum(softmax(z) * z).
    """
    z.sub_(top[:, None]).clamp_(min=LEAST_LOGIT)  # -inf times a probability of 0 would be NaN
    probabilities = torch.softmax(z, dim=-1)
    entropy = -torch.log(probabilities.amax(-1)) - torch.linalg.vecdot(probabilities, z)
    z.copy_(probabilities)
    return entropy.clamp_(min=0.0)  # of which rounding may leave less
