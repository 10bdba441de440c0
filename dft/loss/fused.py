"""The DFT loss from hidden states: exact, in three matrix products, with the logits of one chunk at a time.

The weight w of a token is a constant of the gradient, and it is known as soon as the token's logits z are. So the
gradient of c * w * nll with respect to the logits, c * w * (softmax(z) - onehot), can be computed in the forward pass,
and with it the gradients of the hidden states and of the head: no logits are kept for the backward pass or recomputed
in it. The factor c * w of a row is applied to its hidden state, which is much shorter than its logits.

Shapes: B batch, T tokens, V vocabulary, H hidden size, N supervised tokens, C tokens of one chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dft.config.loss import CHUNK_MB, CHUNKS_OF_GROUP
from dft.loss.from_logits import NO_DATA, TokenData, supervised_rows, weigh
from dft.loss.softmax import softmax_gradient_
from dft.loss.statistics import Needs, TokenStatistics, token_statistics
from dft.loss.token_weight import TokenWeight


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
    """Filled chunk by chunk; all are float32 but is_top1. Gradients that are not needed are None.

    The gradient of the head is the sum of grad_logits.T @ (factor * h) over groups of chunks. If there is but one
    group, this product waits for the backward pass, which knows the gradient of the loss and the type that is wanted:
    then nothing of the head's size is written twice.
    """

    loss: Tensor  # scalar
    nll: Tensor  # [N]
    is_top1: Tensor  # [N], bool
    weight: Tensor  # [N]
    factor: Tensor  # c * w, [N]
    entropy: Tensor | None  # [N]
    grad_hidden: Tensor | None  # [N, H]
    grad_bias: Tensor | None  # [V]
    grad_weight: Tensor | None = None  # [V, H]
    waiting: tuple[Tensor, Tensor] | None = None  # grad_logits [N, V] and hidden states [N, H], of the only group

    def keep(self, chunk: slice, tokens: TokenStatistics, factor: Tensor) -> None:
        """Keeps the statistics of one chunk, and adds its loss."""
        self.nll[chunk], self.is_top1[chunk], self.weight[chunk] = tokens.nll, tokens.is_top1, tokens.weight
        self.factor[chunk] = factor
        if self.entropy is not None:
            self.entropy[chunk] = tokens.entropy
        self.loss += (factor * tokens.nll).sum()

    def add_grad_weight(self, group: slice, h: Tensor, grad_logits: Tensor) -> None:
        """Adds the gradient of the head of one group of G rows, or keeps what it is made of.

        Args:
            h: hidden states [G, H].
            grad_logits: of nll with respect to the head's logits, [G, V].
        """
        if self.grad_weight is None:
            self.waiting = (grad_logits, h)
        else:
            h = (h * self.factor[group, None]).to(h.dtype)
            _add_product(self.grad_weight, grad_logits.t(), h)

    def scaled_grad_weight(self, grad_loss: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The gradient of the head, [V, H], times that of the loss."""
        if self.waiting is None:
            return _scaled(self.grad_weight, grad_loss, dtype)
        grad_logits, h = self.waiting
        factor = self.factor[:, None]
        if h.dtype == torch.float16:  # whose range is too small for both factors at once
            return _scaled(_product(grad_logits.t(), (h * factor).to(h.dtype)), grad_loss, dtype)
        h = (h * (factor * grad_loss)).to(h.dtype)
        return torch.mm(grad_logits.t(), h) if dtype == h.dtype else _product(grad_logits.t(), h).to(dtype)


class _FusedHead(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, rows, head_weight, bias, targets, how):
        """Loss (scalar), nll, is_top1, entropy and weight [N], see `_fused`; its gradients wait in ctx."""
        results = _fused(rows, head_weight, bias, targets, how, differentiated=ctx.needs_input_grad[:3])
        ctx.results = replace(results, loss=results.loss.detach())  # the loss itself will refer to ctx
        ctx.types = (rows.dtype, head_weight.dtype, None if bias is None else bias.dtype)
        outputs = (results.nll, results.is_top1, results.entropy, results.weight)
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        return results.loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor):
        """The gradients, times that of the loss; once."""
        if ctx.results is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass: compute the loss again")
        results, ctx.results = ctx.results, None
        of_rows, of_weight, of_bias = ctx.types
        grad_hidden = _scaled(results.grad_hidden, grad_loss, of_rows)
        grad_weight = results.scaled_grad_weight(grad_loss, of_weight)
        return grad_hidden, grad_weight, _scaled(results.grad_bias, grad_loss, of_bias), None, None


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient * factor in `dtype`, in one pass; a gradient of that type is overwritten."""
    if gradient is None or gradient.dtype == dtype:
        return None if gradient is None else gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


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
    in_place = dtype == torch.float32  # the gradients of a chunk take the place of its logits
    rows_of_group = how.rows_at_once * (CHUNKS_OF_GROUP if differentiated[1] and not in_place else 1)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        results = _empty_results(rows, bias, how.needs.entropy, differentiated)
        if differentiated[1] and not 0 < len(rows) <= rows_of_group:
            results.grad_weight = torch.zeros_like(head_weight, dtype=torch.float32)
        head_weight = head_weight.to(dtype)
        logits = torch.empty(how.rows_at_once, len(head_weight), dtype=torch.float32, device=device)
        gradients = logits
        if not in_place and any(differentiated):
            gradients = logits.new_empty(min(rows_of_group, len(rows)), len(head_weight), dtype=dtype)
        for group in _slices(0, len(rows), rows_of_group):
            h = rows[group].to(dtype)  # [G, H]
            for chunk in _slices(group.start, group.stop, how.rows_at_once):
                place = slice(chunk.start - group.start, chunk.stop - group.start)  # in the group
                z = _product(h[place], head_weight.t(), out=logits[: chunk.stop - chunk.start])  # [C, V]
                if bias is not None:
                    z += bias
                slope: Tensor | float = 1.0
                if not how.transform.is_identity:
                    z.copy_(how.transform(z))
                    slope = how.transform.slope(z)
                grad_logits = None if not any(differentiated) else z if in_place else gradients[place]  # [C, V]
                tokens = softmax_gradient_(z, targets[chunk], grad_logits, how.needs)
                results.keep(chunk, tokens, weigh(tokens, how.token_weight, how.data[chunk]))
                if grad_logits is not None and not how.transform.is_identity:
                    grad_logits *= slope
                if grad_logits is not None and results.grad_bias is not None:
                    results.grad_bias += results.factor[chunk] @ grad_logits.float()
            grad_logits = gradients[: len(h)]
            if differentiated[0]:
                factor = results.factor[group, None]
                torch.mul(_product(grad_logits, head_weight), factor, out=results.grad_hidden[group])
            if differentiated[1]:
                results.add_grad_weight(group, h, grad_logits)
    return results


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """The range from start to stop in slices of at most `size`."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _empty_results(
    rows: Tensor, bias: Tensor | None, with_entropy: bool, differentiated: tuple[bool, bool, bool]
) -> _Results:
    of_tokens = {"size": (len(rows),), "device": rows.device}
    return _Results(
        loss=torch.zeros((), dtype=torch.float32, device=rows.device),
        nll=torch.empty(**of_tokens, dtype=torch.float32),
        is_top1=torch.empty(**of_tokens, dtype=torch.bool),
        weight=torch.empty(**of_tokens, dtype=torch.float32),
        factor=torch.empty(**of_tokens, dtype=torch.float32),
        entropy=torch.empty(**of_tokens, dtype=torch.float32) if with_entropy else None,
        grad_hidden=torch.empty_like(rows, dtype=torch.float32) if differentiated[0] else None,
        grad_bias=torch.zeros_like(bias, dtype=torch.float32) if differentiated[2] else None,
    )


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32, whatever the inputs are."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
