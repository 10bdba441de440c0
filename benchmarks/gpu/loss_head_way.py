"""Measures ways to compute the DFT loss and its gradients; the worker of loss_head.py, which names them.

Seconds are those of forward and backward, memory is the most above the inputs, and the error is that of the gradients
against exact ones, on a sample of tokens and of rows of the head.

Shapes: T tokens, N supervised tokens, V vocabulary, H hidden size.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.loss_head import measured_of
from benchmarks.gpu.part import Skipped, serve
from benchmarks.gpu.timing import seconds_of
from benchmarks.loss_head import Case
from benchmarks.loss_head_ops import WAYS, Way, forget_peak, fused, peak_bytes, step, supervised, weighted_mean
from benchmarks.measuring import installed
from dft.config.loss import CHUNK_MB

PACKAGE_OF = {  # what a way needs
    "liger_scaled": "liger-kernel", "liger_scaled_torch": "liger-kernel", "liger": "liger-kernel",
    "trl": "trl", "cut": "cut-cross-entropy",
}  # fmt: skip
SAMPLE = 256  # tokens, and rows of the head, whose gradients are compared
ROWS_AT_ONCE = 512  # of the reference's logits


def liger_scaled(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Liger's scaled cross-entropy, which gives nll and entropy of each token; the weights are put outside."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    rows, targets = supervised(hidden, labels)
    nll, _entropy = Function.apply(rows, weight, targets, 1.0, -100, 1, True)
    return weighted_mean(nll, alpha)


def liger_scaled_torch(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """What Liger takes where its kernel for Hopper GPUs isn't there."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction as Function

    rows, targets = supervised(hidden, labels)
    nll, _entropy = Function.apply(rows, weight, targets, 1.0, -100, True)
    return weighted_mean(nll, alpha)


def step_of(way: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, float], None]:
    """Forward and backward of a way.

    Raises:
        Skipped: what it needs isn't installed.
    """
    package = PACKAGE_OF.get(way)
    if package and not installed(package):
        raise Skipped(f"{package} is not installed")
    if way.startswith("torch_") and not hasattr(F, "linear_cross_entropy"):
        raise Skipped(f"torch {torch.__version__} has no linear_cross_entropy")
    if way == "products":
        return partial(step, "gemms")
    if way == "ours":
        return _backward_of(fused(CHUNK_MB[device.type]))
    if way.startswith("ours_"):
        return _backward_of(fused(float(way.removeprefix("ours_"))))
    own: dict[str, Way] = {"liger_scaled": liger_scaled, "liger_scaled_torch": liger_scaled_torch}
    return _backward_of(own.get(way) or WAYS[way])


def _backward_of(way: Way) -> Callable[[Tensor, Tensor, Tensor, float], None]:
    return lambda *inputs: way(*inputs).backward()


@dataclass
class Inputs:
    """Hidden states [T, H], the head [V, H] and labels [T] of a case, and exact gradients on a sample.

    Attributes:
        tokens, grad_hidden: places among the supervised tokens, and the gradients of their hidden states.
        entries, grad_weight: rows of the head, and their gradients.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    alpha: float
    tokens: Tensor
    entries: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor

    def errors(self) -> dict[str, float]:
        """Relative errors of the gradients that a step left in the inputs."""
        is_supervised = F.pad(self.labels[1:], (0, 1), value=-100) != -100
        found = self.hidden.grad[is_supervised][self.tokens], self.weight.grad[self.entries]
        pairs = zip(("error_hidden", "error_weight"), found, (self.grad_hidden, self.grad_weight), strict=True)
        return {name: float((x.to(ref.dtype) - ref).norm() / ref.norm()) for name, x, ref in pairs}


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs in which every second token is likely, as in a model that knows something."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(case.tokens, case.hidden, device=device).to(dtype)
    weight = (2 * torch.randn(case.vocabulary, case.hidden, device=device) / case.hidden**0.5).to(dtype)
    labels = torch.randint(case.vocabulary, (case.tokens,), device=device)
    of_next = F.normalize(weight[labels[1:]].float(), dim=-1).to(dtype)
    hidden[:-1:2] += 8 * of_next[::2]
    labels[torch.rand(case.tokens, device=device) >= case.share] = -100
    _, targets = supervised(hidden, labels)
    tokens = torch.arange(0, len(targets), max(1, len(targets) // SAMPLE), device=device)
    entries = targets[tokens].unique()  # gradients of other entries are small
    grad_hidden, grad_weight = exact_gradients(hidden, weight, labels, case.alpha, (tokens, entries))
    hidden.requires_grad_(), weight.requires_grad_()
    return Inputs(hidden, weight, labels, case.alpha, tokens, entries, grad_hidden, grad_weight)


def exact_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float, sample: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of a sample of supervised tokens and one of rows of the head, from the formula of the gradient.

    In float64 on a processor; in float32 on a GPU, where float64 may be slow.
    """
    wide = torch.float32 if hidden.is_cuda else torch.float64
    (rows, targets), (tokens, entries) = supervised(hidden, labels), sample
    head = weight.to(wide)
    grad_hidden = torch.empty(len(tokens), head.shape[1], dtype=wide, device=head.device)
    grad_weight = torch.zeros(len(entries), head.shape[1], dtype=wide, device=head.device)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = slice(start, start + ROWS_AT_ONCE)
        h, y = rows[chunk].to(wide), targets[chunk, None]
        gradient = torch.softmax(h @ head.t(), dim=-1)  # [C, V]
        factor = (alpha * gradient.gather(1, y) + 1 - alpha) / len(rows)  # [C, 1]
        gradient.scatter_add_(1, y, torch.full_like(factor, -1)).mul_(factor)
        grad_weight += gradient[:, entries].t() @ h
        is_here = (tokens >= start) & (tokens < start + ROWS_AT_ONCE)
        grad_hidden[is_here] = gradient[tokens[is_here] - start] @ head
    return grad_hidden, grad_weight


class Worker:
    """Measures items, and keeps the inputs of a case for the next one."""

    def __init__(self, is_tiny: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.times, self.warm = (3, 1) if is_tiny else (10, 3)
        self._kept: tuple[Case, Inputs] | None = None

    def inputs(self, case: Case) -> Inputs:
        if self._kept is None or self._kept[0] != case:
            self._kept = None  # its memory is needed
            self._kept = (case, make_inputs(case, self.device))
        return self._kept[1]

    def __call__(self, item: str) -> dict[str, Any]:
        way, case = measured_of(item)
        do = step_of(way, self.device)
        inputs = self.inputs(case)

        def action() -> None:
            inputs.hidden.grad = inputs.weight.grad = None
            do(inputs.hidden, inputs.weight, inputs.labels, inputs.alpha)

        inputs.hidden.grad = inputs.weight.grad = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        forget_peak(self.device)
        before = peak_bytes(self.device)
        seconds = median(seconds_of(action, self.times, self.warm))
        result: dict[str, Any] = {"seconds": seconds, "memory_mb": (peak_bytes(self.device) - before) / 1e6}
        num_tokens = len(supervised(inputs.hidden.detach(), inputs.labels)[1])
        result["tflops"] = 6 * num_tokens * case.vocabulary * case.hidden / seconds / 1e12
        return result if way == "products" else result | inputs.errors()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", nargs="+")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    serve(args.items, Worker(args.tiny))


if __name__ == "__main__":
    main()
