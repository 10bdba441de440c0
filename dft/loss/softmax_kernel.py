"""Two passes over logits as one Triton kernel: what is asked of their softmax, then the gradient of nll.

PyTorch's builds for GPUs bring the package triton. With TRITON_INTERPRET=1 a processor runs the kernel, slowly.

Shapes: C rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dft.loss.statistics import Needs, TokenStatistics

BLOCK = 4096  # logits of a row at once
WARPS = 8


def softmax_gradient(z: Tensor, targets: Tensor, out: Tensor | None, needs: Needs) -> TokenStatistics:
    """Statistics of float32 logits z [C, V], without top_entropy; softmax(z) - onehot(targets) is written to `out`.

    Args:
        z: with rows that are contiguous.
        out: [C, V] in any float type, or z itself, or None if the gradient isn't wanted.
    """
    results = torch.empty(len(z), 4, dtype=torch.float32, device=z.device)
    if len(z):
        written = z if out is None else out
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _softmax_gradient[(len(z),)](
                *(z, written, targets, results, z.shape[1], z.stride(0), written.stride(0)),
                WANTS_GRADIENT=out is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    nll, is_top1, entropy, concentration = results.t().contiguous()
    return TokenStatistics(
        targets,
        nll,
        torch.exp(-nll),
        is_top1.bool(),
        entropy=entropy if needs.entropy else None,
        concentration=concentration if needs.concentration else None,
    )


@triton.jit
def _softmax_gradient(
    z_pointer,
    out_pointer,
    target_pointer,
    result_pointer,
    vocab_size,
    z_stride,
    out_stride,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: nll, whether the target is the likeliest token, entropy and sum(p**2) are written; then the gradient.

    Every lane keeps sums over its own logits, relative to the greatest of them. With z relative to the greatest logit
    and S = sum(exp(z)): entropy = log S - sum(exp(z) z) / S, and the sum of squared probabilities p is
    sum(exp(z)**2) / S**2.
    """
    row = tl.program_id(0).to(tl.int64)
    z_pointer += row * z_stride
    out_pointer += row * out_stride
    target = tl.load(target_pointer + row)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e38, tl.float32)  # finite, so that a lane that has seen nothing but -inf isn't NaN
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)  # sum(exp(z) z)
    squares = tl.zeros([BLOCK], tl.float32)  # sum(exp(z)**2)
    picked = tl.zeros([BLOCK], tl.float32)  # the target's logit in its lane; `out` may take its place in memory later
    for start in range(0, vocab_size, BLOCK):
        places = start + lanes
        z = tl.load(z_pointer + places, mask=places < vocab_size, other=float("-inf"))
        picked = tl.where(places == target, z, picked)
        step = z - top
        smaller = tl.exp(-tl.abs(step))
        is_greater = step > 0
        shrink = tl.where(is_greater, smaller, 1.0)  # of the sums, when the greatest logit changes
        term = tl.where(is_greater, 1.0, smaller)
        below = tl.where(is_greater, 0.0, tl.maximum(step, -200.0))  # -inf times a probability of 0 would be NaN
        moment = (moment - tl.where(is_greater, step, 0.0) * total) * shrink + term * below
        squares = squares * shrink * shrink + term * term
        total = total * shrink + term
        top = tl.where(is_greater, z, top)

    greatest = tl.max(top, 0)
    step = top - greatest
    shrink = tl.exp(step)
    moment = tl.sum((moment + step * total) * shrink, 0)
    squares = tl.sum(squares * shrink * shrink, 0)
    total = tl.sum(total * shrink, 0)
    of_target = tl.sum(picked, 0)
    entropy = tl.log(total) - moment / total
    result_pointer += 4 * row
    tl.store(result_pointer, greatest - of_target + tl.log(total))
    tl.store(result_pointer + 1, (of_target >= greatest).to(tl.float32))
    tl.store(result_pointer + 2, tl.where(entropy < 0, 0.0, entropy))  # of which rounding may leave less
    tl.store(result_pointer + 3, squares / (total * total))

    if WANTS_GRADIENT:
        num_blocks = tl.cdiv(vocab_size, BLOCK)
        for block in range(num_blocks):  # from the end, of which the most is in the cache still
            places = (num_blocks - 1 - block) * BLOCK + lanes
            z = tl.load(z_pointer + places, mask=places < vocab_size, other=float("-inf"))
            gradient = tl.exp(z - greatest) / total - (places == target).to(tl.float32)
            tl.store(out_pointer + places, gradient.to(out_pointer.dtype.element_ty), mask=places < vocab_size)
