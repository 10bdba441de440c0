"""The DFT loss from hidden states: exact, in three matrix products, with the logits of one chunk at a time.

The weight w of a token is a constant of the gradient, and it is known as soon as the token's logits z are.
So the gradient of c * w * nll with respect to the logits, c * w * (softmax(z) - onehot), is known there and
then, and with it the gradients of the hidden states and of the head: no logits are kept for the backward
pass or made again in it. The factor c * w of a row is applied to its hidden state, which is much shorter.

Shapes: B batch, T tokens, V vocabulary, H hidden size, N supervised tokens, C tokens of one chunk.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dft.loss.from_logits import (
    TokenStatistics,
    TokenWeight,
    entropy_of,
    supervised_rows,
    token_statistics,
    weighted_sum,
)

# Of float32 logits, by default. cpu: measured by benchmarks/loss_head.py, larger chunks save little time. cuda: by
# arithmetic, some 1,700 rows of a vocabulary of 150,000, so that products of matrices outweigh adding them up.
CHUNK_MB = {"cpu": 48.0, "cuda": 1024.0}


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
    weight: TokenWeight,
    scales: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    chunk_mb: float = CHUNK_MB["cpu"],
    with_entropy: bool = False,
) -> tuple[Tensor, TokenStatistics]:
    """As `dft_loss.dft_loss_sum`, of the logits hidden @ head_weight.T + bias, which are never held as a whole.

    Inside autocast it multiplies in autocast's type, as a linear layer does; statistics and sums are float32.

    Args:
        hidden: [B, T, H].
        head_weight, bias: [V, H] and [V]; those that don't require gradients cost none.
        labels, weight, scales, with_entropy: see dft_loss.dft_loss_sum.
        transform: what the model does to its logits.
        chunk_mb: MB (10**6 bytes) of float32 logits at once; at least one row is taken.

    Returns:
        sum of c * w * nll (scalar, float32), with gradient, and the tokens' statistics, without.
    """
    rows, targets, places = supervised_rows(hidden, labels)  # [N, H], [N]
    chunk = _rows_at_once(chunk_mb, head_weight.shape[0], len(rows))
    args = (rows, head_weight, bias, targets, scales, weight, transform, chunk, with_entropy)
    if torch.is_grad_enabled():
        loss, nll, is_top1, entropy = _FusedHead.apply(*args)
    else:
        loss, nll, is_top1, entropy, *_ = _fused(*args, needs=(False, False, False))
    return loss, TokenStatistics(targets, nll, torch.exp(-nll), is_top1, entropy, places)


def chunked_dft_loss_sum(
    hidden: Tensor,
    head: torch.nn.Module,
    labels: Tensor,
    weight: TokenWeight,
    scales: Tensor | None = None,
    *,
    transform: LogitTransform = LogitTransform(),
    chunk_mb: float = CHUNK_MB["cpu"],
    vocab_size: int,
    with_entropy: bool = False,
) -> tuple[Tensor, TokenStatistics]:
    """As `fused_dft_loss_sum`, with any module as the head: adapters, quantized weights, hooks.

    The module is called for one chunk after the other, and once more for each in the backward pass.

    Args:
        chunk_mb: if it is infinite, the module is called once, with all supervised tokens.
    """
    rows, targets, places = supervised_rows(hidden, labels)  # [N, H], [N]
    chunk = _rows_at_once(chunk_mb, vocab_size, len(rows))

    def score(rows: Tensor, targets: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        logits = head(rows).float()
        tokens = token_statistics(logits if transform.is_identity else transform(logits), targets, with_entropy)
        return weighted_sum(tokens, weight, scales), tokens.nll.detach(), tokens.is_top1, tokens.entropy

    parts = []
    for start in range(0, max(len(rows), 1), chunk):
        some = slice(start, start + chunk)
        args = (rows[some], targets[some], None if scales is None else scales[some])
        if torch.is_grad_enabled() and chunk < len(rows):
            parts.append(checkpoint(score, *args, use_reentrant=False))
        else:
            parts.append(score(*args))
    losses, nll, is_top1, entropy = zip(*parts, strict=True)
    nll = torch.cat(nll)
    entropy = torch.cat(entropy) if with_entropy else None
    tokens = TokenStatistics(targets, nll, torch.exp(-nll), torch.cat(is_top1), entropy, places)
    return torch.stack(losses).sum(), tokens


def _rows_at_once(chunk_mb: float, vocab_size: int, num_rows: int) -> int:
    """How many rows of float32 logits `chunk_mb` hold: at least one, and no more than there are."""
    return max(1, int(min(chunk_mb * 1e6 / (4 * vocab_size), num_rows)))


class _FusedHead(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, rows, head_weight, bias, targets, scales, weight, transform, chunk, with_entropy):
        """Loss (scalar), nll, is_top1 and entropy [N], see `_fused`; its gradients wait in ctx."""
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        loss, nll, is_top1, entropy, *gradients = _fused(
            rows, head_weight, bias, targets, scales, weight, transform, chunk, with_entropy, needs=needs
        )
        ctx.gradients = gradients
        ctx.types = (rows.dtype, head_weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll, is_top1, *([] if entropy is None else [entropy]))
        return loss, nll, is_top1, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor):
        """The gradients, times that of the loss; once."""
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass: compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(of_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.types, strict=True)
        )
        return *scaled, None, None, None, None, None, None


def _fused(
    rows: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scales: Tensor | None,
    weight: TokenWeight,
    transform: LogitTransform,
    chunk: int,
    with_entropy: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, nll, is_top1, entropy [N], and the gradients of rows, head_weight and bias, those that are needed."""
    device = rows.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head_weight.dtype
    if device.type == "cpu":
        dtype = torch.float32  # processors gain nothing from 16 bits, and lose digits
    num_rows, vocab_size = len(rows), len(head_weight)
    nll = torch.empty(num_rows, dtype=torch.float32, device=device)
    is_top1 = torch.empty(num_rows, dtype=torch.bool, device=device)
    entropy = torch.empty(num_rows, dtype=torch.float32, device=device) if with_entropy else None
    loss = torch.zeros((), dtype=torch.float32, device=device)
    of_rows = torch.empty_like(rows, dtype=torch.float32) if needs[0] else None
    of_weight = torch.zeros_like(head_weight, dtype=torch.float32) if needs[1] else None
    of_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        head_weight = head_weight.to(dtype)
        buffer = torch.empty(chunk, vocab_size, dtype=torch.float32, device=device)
        for start in range(0, num_rows, chunk):
            some = slice(start, start + chunk)
            h, y = rows[some].to(dtype), targets[some]  # [C, H], [C]
            z = _product(h, head_weight.t(), out=buffer[: len(h)])  # [C, V]
            if bias is not None:
                z += bias
            slope: Tensor | float = 1.0
            if not transform.is_identity:
                z.copy_(transform(z))
                slope = transform.slope(z)
            if entropy is not None:
                entropy[some] = entropy_of(z)
            nll[some], is_top1[some], g = softmax_gradient_(z, y, dtype, any(needs))
            c = weight(torch.exp(-nll[some]), y)
            c = c if scales is None else c * scales[some]
            loss += (c * nll[some]).sum()
            if g is None:
                continue
            if not transform.is_identity:
                g *= slope
            if of_rows is not None:
                torch.mul(_product(g, head_weight), c[:, None], out=of_rows[some])
            if of_weight is not None:
                _add_product(of_weight, g.t(), (h * c[:, None]).to(dtype))
            if of_bias is not None:
                of_bias += c @ g.float()
    return loss, nll, is_top1, entropy, of_rows, of_weight, of_bias


def softmax_gradient_(
    z: Tensor, targets: Tensor, dtype: torch.dtype, wants_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """nll and is_top1 [C] of logits z [C, V], which it overwrites, and softmax(z) - onehot(targets) in `dtype`."""
    if z.is_cuda and find_spec("triton"):  # which torch.compile needs for a GPU
        return _compiled()(z, targets, dtype, wants_gradient)
    if not wants_gradient:
        tokens = token_statistics(z, targets)
        return tokens.nll, tokens.is_top1, None
    nll, is_top1, gradient = _softmax_gradient_in_place(z, targets)
    return nll, is_top1, gradient.to(dtype)


def _softmax_gradient_in_place(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two passes over the logits: one for the greatest, one for the softmax, whose kernel keeps a row in the cache."""
    index = targets[:, None]
    of_target = z.gather(-1, index).squeeze(-1)
    top, place = z.max(dim=-1)
    torch.softmax(z, dim=-1, out=z)
    # the softmax of the greatest logit is 1 / sum(exp(z - top)); that of the target's may underflow
    nll = top - of_target - torch.log(z.gather(-1, place[:, None]).squeeze(-1))
    z.scatter_add_(-1, index, torch.full_like(index, -1, dtype=z.dtype))
    return nll, of_target >= top, z


def _softmax_gradient(
    z: Tensor, targets: Tensor, dtype: torch.dtype, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same without overwriting, for torch.compile to make a few kernels of."""
    of_target = z.gather(-1, targets[:, None])
    log_sum = torch.logsumexp(z, dim=-1, keepdim=True)
    nll, is_top1 = (log_sum - of_target).squeeze(-1), (of_target >= z.amax(-1, keepdim=True)).squeeze(-1)
    if not wants_gradient:
        return nll, is_top1, None
    is_target = torch.arange(z.shape[-1], device=z.device) == targets[:, None]
    return nll, is_top1, (torch.exp(z - log_sum) - is_target.to(z.dtype)).to(dtype)


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
