"""One way of loss_head.py to compute the DFT loss and its gradients, measured in a process of its own; prints JSON.

    python benchmarks/loss_head_ops.py fused --n 1024 --v 32000 --h 512 --share 1.0

Every way gets hidden states [N, H], the weights of the head [V, H] and labels [N], and leaves gradients of
both. Seconds are medians of forward + backward; memory is what the process or the GPU had at most, less what
it had before.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from dft.loss.fused import fused_dft_loss_sum
from dft.loss.token_weight import TokenWeight

Way = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of the supervised tokens alone."""
    targets = F.pad(labels[1:], (0, 1), value=-100)
    return hidden[targets != -100], targets[targets != -100]


def weighted_mean(nll: Tensor, alpha: float) -> Tensor:
    """The DFT loss from the nll of supervised tokens."""
    return ((alpha * torch.exp(-nll.detach().float()) + 1 - alpha) * nll).mean()


def original(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """As the documents of the original system describe it: from all logits, in float32."""
    logits = hidden @ weight.t()
    flat, targets = logits[:-1].contiguous().float(), labels[1:].contiguous()
    losses = F.cross_entropy(flat, targets, reduction="none", ignore_index=-100)
    is_valid = targets != -100
    with torch.no_grad():
        p_correct = F.softmax(flat, dim=-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    weights = p_correct * alpha + (1 - alpha)
    return (losses * weights)[is_valid].sum() / is_valid.sum()


def original_rows(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """The same from the logits of supervised tokens alone (logits_to_keep)."""
    rows, targets = supervised(hidden, labels)
    logits = (rows @ weight.t()).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    with torch.no_grad():
        p_correct = F.softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)
    return (losses * (p_correct * alpha + (1 - alpha))).mean()


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """torch.compile of the original."""
    return _compiled(hidden, weight, labels, alpha)


_compiled = torch.compile(original)


def trl(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """TRL's head as its SFTTrainer calls it: without Triton it scores every position, supervised or not.

    It knows alpha = 1 only; the weights are put outside.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ("log_probs", "entropy", "is_top1")
    settings = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs)
    rows, targets = supervised(hidden, labels) if hidden.is_cuda else (hidden[:-1], labels[1:])
    log_probs, *_ = ChunkedLogProbFunction.apply(rows, weight, None, targets.clamp(min=0), *settings)
    return weighted_mean(-log_probs[targets != -100], alpha)


def torch_linear(chunk: int | None) -> Way:
    """torch's linear_cross_entropy in chunks, with the weights outside."""

    def way(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
        rows, targets = supervised(hidden, labels)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return weighted_mean(F.linear_cross_entropy(rows, weight, targets, reduction="none", options=options), alpha)

    return way


def cut(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Apple's cut cross-entropy, with the weights outside."""
    from cut_cross_entropy import linear_cross_entropy

    rows, targets = supervised(hidden, labels)
    impl = "cce" if hidden.is_cuda else "torch_compile"
    return weighted_mean(linear_cross_entropy(rows, weight, targets, reduction="none", impl=impl), alpha)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """Liger's fused linear cross-entropy with token scaling, which is alpha = 1."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows, targets = supervised(hidden, labels)
    result = liger_fused_linear_cross_entropy(rows, weight, targets, reduction="mean", use_token_scaling=True)
    return result[0] if isinstance(result, tuple) else result


def fused(chunk_mb: float) -> Way:
    """This project's."""

    def way(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> Tensor:
        weights = TokenWeight(alpha)
        loss, tokens = fused_dft_loss_sum(hidden[None], weight, labels[None], weights, chunk_mb=chunk_mb)
        return loss / tokens.nll.numel()

    return way


WAYS: dict[str, Way] = {
    "original": original,
    "original_rows": original_rows,
    "compiled": compiled,
    "trl": trl,
    "torch_auto": torch_linear(None),
    "torch_2048": torch_linear(2048),
    "cut": cut,
    "liger": liger,
    **{f"fused_{size}": fused(size) for size in (16, 48, 256, 1024)},
}


def step(way: str, hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> None:
    """Forward and backward. gemms: the three matrix products alone, of supervised tokens."""
    if way != "gemms":
        WAYS[way](hidden, weight, labels, alpha).backward()
        return
    with torch.no_grad():
        rows, _ = supervised(hidden, labels)
        logits = rows @ weight.t()
        weight.grad = logits.t() @ rows
        hidden.grad = torch.zeros_like(hidden)
        torch.mm(logits, weight, out=hidden.grad[: len(rows)])


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget_peak(device: torch.device) -> None:
    """Makes the memory in use now the most so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def errors(hidden: Tensor, weight: Tensor, labels: Tensor, alpha: float) -> dict[str, float]:
    """Relative errors of the gradients against float64."""
    inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    original_rows(*inputs, labels, alpha).backward()
    names = ("error_hidden", "error_weight")
    pairs = zip(names, (hidden, weight), inputs, strict=True)
    return {name: float((x.grad.double() - ref.grad).norm() / ref.grad.norm()) for name, x, ref in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["gemms", *WAYS])
    for name in ("n", "v", "h"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the tokens that are supervised")
    parser.add_argument("--alpha", type=float, default=0.7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--error", action="store_true", help="compare with float64")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    hidden = torch.randn(args.n, args.h, device=device).to(dtype)
    weight = (2 * torch.randn(args.v, args.h, device=device) / args.h**0.5).to(dtype)
    labels = torch.randint(args.v, (args.n,), device=device)
    # some tokens are likely, as in a model that knows something
    likely = torch.arange(args.n, device=device) % 2 == 0
    hidden[:-1][likely[:-1]] += 8 * F.normalize(weight[labels[1:]].float(), dim=-1)[likely[:-1]].to(dtype)
    labels[torch.rand(args.n, device=device) >= args.share] = -100
    hidden.requires_grad_(), weight.requires_grad_()

    forget_peak(device)
    before, seconds = peak_bytes(device), []
    for i in range(args.times + 1):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        step(args.way, hidden, weight, labels, args.alpha)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 0:  # the first one compiles and makes room
            seconds.append(time.perf_counter() - start)
    result = {"seconds": median(seconds), "memory": peak_bytes(device) - before}
    if args.error and args.way != "gemms":
        result |= errors(hidden, weight, labels, args.alpha)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
