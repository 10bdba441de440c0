"""The DFT loss from hidden states: exact, in three matrix products, with the logits of one chunk at a time.

The weight w of a token is a constant of the gradient, and it is known as soon as the token's logits z are. So the
gradient of c * w * nll with respect to the logits, c * w * (softmax(z) - onehot), can be computed in the forward pass,
and with it the gradients of the hidden states and of the head: no logits are kept for the backward pass or recomputed
in it. The factor c * w of a row is applied to its hidden state, which is much shorter than its logits.

Shapes: B batch, T tokens, V vocabulary, H hidden size, N supervised tokens, C tokens of one chunk.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dft.config.loss import CHUNK_MB
from dft.loss.from_logits import NO_DATA, TokenData, supervised_rows, weigh
from dft.loss.statistics import (
    Needs,
    TokenStatistics,
    concentration_of,
    entropy_of,
    token_statistics,
    top_entropy_of,
)
from dft.loss.token_weight import TokenWeight

ROWS_IN_CACHE = 16  # of logits, which a processor reads again before it forgets them
LEAST_LOGIT = -200.0  # below the greatest one: its exponential is 0 in float32


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits of its head: z -> softcap * tanh(scale * z / softcap), or scale * z.

    Args:
        scale: as in Granite (1 / logits_scaling) and Cohere (logit_scale).
        softcap: as in Gemma 2; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """The derivative, from the transformed logits."""
        return self.scale if self.softcap is None else self.scale * (1.0 - (transformed / self.softcap) ** 2)


def fused_dft_loss_sum(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    token_weight: TokenWeight,
    data: TokenData = NO_DATA,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    chunk_mb: float = CHUNK_MB["cpu"],
    needs: Needs | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """As `from_logits.dft_loss_sum`, of the logits hidden @ head_weight.T + bias, which are never held as a whole.

    Inside autocast it multiplies in autocast's type, as a linear layer does; statistics and sums are float32.

    Args:
        hidden: [B, T, H].
        head_weight, bias: [V, H] and [V]; those that don't require gradients cost none.
        labels, token_weight, data, needs: see from_logits.dft_loss_sum. Of the statistics that only the weight needs,
            the entropy is returned.
        transform: what the model does to its logits.
        chunk_mb: MB (10**6 bytes) of float32 logits at once; at least one row is taken.

    Returns:
        sum of c * w * nll (scalar, float32), with gradient, and the tokens' statistics, without.
    """
    rows, targets, places = supervised_rows(hidden, labels)  # [N, H], [N]
    rows_at_once = _rows_at_once(chunk_mb, head_weight.shape[0], len(rows))
    how = _Computation(token_weight, data, transform, rows_at_once, needs or token_weight.needs)
    args = (rows, head_weight, bias, targets, how)
    if torch.is_grad_enabled():
        loss, nll, is_top1, entropy, weight = _FusedHead.apply(*args)
    else:
        results = _fused(*args, differentiated=(False, False, False))
        loss, nll, is_top1 = results.loss, results.nll, results.is_top1
        entropy, weight = results.entropy, results.weight
    tokens = TokenStatistics(targets, nll, torch.exp(-nll), is_top1, entropy)
    return loss, replace(tokens, reference_log_p=data.reference_log_p, weight=weight, places=places)


def chunked_dft_loss_sum(
    hidden: Tensor,
    head: torch.nn.Module,
    labels: Tensor,
    token_weight: TokenWeight,
    data: TokenData = NO_DATA,
    *,
    transform: LogitTransform = LogitTransform(),
    chunk_mb: float = CHUNK_MB["cpu"],
    vocab_size: int,
    needs: Needs | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """As `fused_dft_loss_sum`, with any module as the head: adapters, quantized weights, hooks.

    The module is called for one chunk after the other, and once more for each in the backward pass.

    Args:
        chunk_mb: if it is infinite, the module is called once, with all supervised tokens.
    """
    rows, targets, places = supervised_rows(hidden, labels)  # [N, H], [N]
    rows_at_once = _rows_at_once(chunk_mb, vocab_size, len(rows))

    needs = needs or token_weight.needs

    def score(rows: Tensor, targets: Tensor, data: TokenData) -> tuple[Tensor, ...]:
        logits = head(rows).float()
        tokens = token_statistics(logits if transform.is_identity else transform(logits), targets, needs)
        factors = weigh(tokens, token_weight, data)
        found = ((factors * tokens.nll).sum(), tokens.nll.detach(), tokens.is_top1, tokens.weight)
        return found if tokens.entropy is None else (*found, tokens.entropy)

    parts = []
    for start in range(0, max(len(rows), 1), rows_at_once):
        chunk = slice(start, start + rows_at_once)
        args = (rows[chunk], targets[chunk], data[chunk])
        if torch.is_grad_enabled() and rows_at_once < len(rows):
            parts.append(checkpoint(score, *args, use_reentrant=False))
        else:
            parts.append(score(*args))
    losses, *found = zip(*parts, strict=True)
    nll, is_top1, weight, *entropy = (torch.cat(of_chunks) for of_chunks in found)
    tokens = TokenStatistics(targets, nll, torch.exp(-nll), is_top1, *entropy)
    tokens = replace(tokens, reference_log_p=data.reference_log_p, weight=weight, places=places)
    return torch.stack(losses).sum(), tokens


def _rows_at_once(chunk_mb: float, vocab_size: int, num_rows: int) -> int:
    """How many rows of float32 logits `chunk_mb` hold: at least one, and no more than there are."""
    return max(1, int(min(chunk_mb * 1e6 / (4 * vocab_size), num_rows)))


@dataclass(frozen=True)
class _Computation:
    """What is computed of the logits, and of how many rows at once."""

    token_weight: TokenWeight
    data: TokenData
    transform: LogitTransform
    rows_at_once: int
    needs: Needs


@dataclass
class _Results:
    """Filled chunk by chunk; all are float32 but is_top1. Gradients that are not needed are None."""

    loss: Tensor  # scalar
    nll: Tensor  # [N]
    is_top1: Tensor  # [N], bool
    weight: Tensor  # [N]
    entropy: Tensor | None  # [N]
    grad_hidden: Tensor | None  # [N, H]
    grad_weight: Tensor | None  # [V, H]
    grad_bias: Tensor | None  # [V]

    def keep(self, chunk: slice, tokens: TokenStatistics) -> None:
        """Keeps the statistics of one chunk."""
        self.nll[chunk], self.is_top1[chunk], self.weight[chunk] = tokens.nll, tokens.is_top1, tokens.weight
        if self.entropy is not None:
            self.entropy[chunk] = tokens.entropy

    def add_gradients(self, chunk: slice, h: Tensor, grad_logits: Tensor, factor: Tensor, head_weight: Tensor) -> None:
        """Adds the gradients of one chunk.

        Args:
            h: hidden states [C, H].
            grad_logits: of nll with respect to the head's logits, [C, V].
            factor: c * w of each row, [C].
        """
        if self.grad_hidden is not None:
            torch.mul(_product(grad_logits, head_weight), factor[:, None], out=self.grad_hidden[chunk])
        if self.grad_weight is not None:
            _add_product(self.grad_weight, grad_logits.t(), (h * factor[:, None]).to(h.dtype))
        if self.grad_bias is not None:
            self.grad_bias += factor @ grad_logits.float()


class _FusedHead(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, rows, head_weight, bias, targets, how):
        """Loss (scalar), nll, is_top1, entropy and weight [N], see `_fused`; its gradients wait in ctx."""
        results = _fused(rows, head_weight, bias, targets, how, differentiated=ctx.needs_input_grad[:3])
        ctx.gradients = (results.grad_hidden, results.grad_weight, results.grad_bias)
        ctx.types = (rows.dtype, head_weight.dtype, None if bias is None else bias.dtype)
        outputs = (results.nll, results.is_top1, results.entropy, results.weight)
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        return results.loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor):
        """The gradients, times that of the loss; once."""
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.types, strict=True)
        )
        return *scaled, None, None


def _fused(
    rows: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    how: _Computation,
    differentiated: tuple[bool, bool, bool],
) -> _Results:
    """Loss, statistics, and the gradients of those of rows, head_weight and bias that are differentiated."""
    device = rows.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head_weight.dtype
    if device.type == "cpu":
        dtype = torch.float32  # processors gain nothing from 16 bits, and lose digits
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        results = _empty_results(rows, head_weight, bias, how.needs.entropy, differentiated)
        head_weight = head_weight.to(dtype)
        buffer = torch.empty(how.rows_at_once, len(head_weight), dtype=torch.float32, device=device)
        for start in range(0, len(rows), how.rows_at_once):
            chunk = slice(start, start + how.rows_at_once)
            h, y = rows[chunk].to(dtype), targets[chunk]  # [C, H], [C]
            z = _product(h, head_weight.t(), out=buffer[: len(h)])  # [C, V]
            if bias is not None:
                z += bias
            slope: Tensor | float = 1.0
            if not how.transform.is_identity:
                z.copy_(how.transform(z))
                slope = how.transform.slope(z)
            tokens, grad_logits = softmax_gradient_(z, y, dtype, how.needs, any(differentiated))
            factor = weigh(tokens, how.token_weight, how.data[chunk])  # [C]
            results.keep(chunk, tokens)
            results.loss += (factor * tokens.nll).sum()
            if grad_logits is not None:
                if not how.transform.is_identity:
                    grad_logits *= slope
                results.add_gradients(chunk, h, grad_logits, factor, head_weight)
    return results


def _empty_results(
    rows: Tensor, head_weight: Tensor, bias: Tensor | None, with_entropy: bool, differentiated: tuple[bool, bool, bool]
) -> _Results:
    of_tokens = {"size": (len(rows),), "device": rows.device}
    return _Results(
        loss=torch.zeros((), dtype=torch.float32, device=rows.device),
        nll=torch.empty(**of_tokens, dtype=torch.float32),
        is_top1=torch.empty(**of_tokens, dtype=torch.bool),
        weight=torch.empty(**of_tokens, dtype=torch.float32),
        entropy=torch.empty(**of_tokens, dtype=torch.float32) if with_entropy else None,
        grad_hidden=torch.empty_like(rows, dtype=torch.float32) if differentiated[0] else None,
        grad_weight=torch.zeros_like(head_weight, dtype=torch.float32) if differentiated[1] else None,
        grad_bias=torch.zeros_like(bias, dtype=torch.float32) if differentiated[2] else None,
    )


def softmax_gradient_(
    z: Tensor, targets: Tensor, dtype: torch.dtype, needs: Needs, wants_gradient: bool = True
) -> tuple[TokenStatistics, Tensor | None]:
    """Statistics of logits z [C, V], which it overwrites, and softmax(z) - onehot(targets) in `dtype`."""
    if z.is_cuda and find_spec("triton"):  # which torch.compile needs for a GPU
        return _softmax_gradient_compiled(z, targets, dtype, needs, wants_gradient)
    if not wants_gradient:
        return token_statistics(z, targets, needs), None
    tokens = _softmax_gradient_in_place(z, targets, needs)
    return tokens, z.to(dtype)


def _softmax_gradient_in_place(z: Tensor, targets: Tensor, needs: Needs) -> TokenStatistics:
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


def _softmax_gradient_compiled(
    z: Tensor, targets: Tensor, dtype: torch.dtype, needs: Needs, wants_gradient: bool
) -> tuple[TokenStatistics, Tensor | None]:
    """The same without overwriting, as a few kernels."""
    top_entropy = top_entropy_of(z, needs.top_k) if needs.top_k else None
    wanted = (wants_gradient, needs.entropy, needs.concentration)
    nll, is_top1, gradient, entropy, concentration = _compiled()(z, targets, dtype, *wanted)
    return TokenStatistics(targets, nll, torch.exp(-nll), is_top1, entropy, concentration, top_entropy), gradient


def _softmax_gradient(
    z: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    wants_gradient: bool,
    needs_entropy: bool,
    needs_concentration: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What is compiled: nll and is_top1 [C], the gradient [C, V], entropy and concentration [C]."""
    of_target = z.gather(-1, targets[:, None])
    log_sum = torch.logsumexp(z, dim=-1, keepdim=True)
    nll, is_top1 = (log_sum - of_target).squeeze(-1), (of_target >= z.amax(-1, keepdim=True)).squeeze(-1)
    probabilities = torch.exp(z - log_sum)
    entropy = entropy_of(probabilities) if needs_entropy else None
    concentration = probabilities.square().sum(-1) if needs_concentration else None
    if not wants_gradient:
        return nll, is_top1, None, entropy, concentration
    is_target = torch.arange(z.shape[-1], device=z.device) == targets[:, None]
    return nll, is_top1, (probabilities - is_target.to(z.dtype)).to(dtype), entropy, concentration


@lru_cache
def _compiled() -> Any:
    return torch.compile(_softmax_gradient, dynamic=True)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32, whatever the inputs are."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return (
        torch.mm(a, b, out_dtype=torch.float32, out=out)
        if out is not None
        else torch.mm(a, b, out_dtype=torch.float32)
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
