"""The DFT loss with its gradients in the sizes of real heads: this project's, its peers', and three bare products."""

from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.part import Part, numbers, reason_of, results_of, run
from benchmarks.loss_head import Case

WORKER = "benchmarks.gpu.loss_head_way"
LARGE, MEDIUM = Case(8192, 151936, 4096, 1.0, 1.0), Case(8192, 128256, 2048, 1.0, 1.0)
CASES = (LARGE, LARGE._replace(share=0.3), MEDIUM, MEDIUM._replace(share=0.3))
TINY = (Case(64, 512, 32, 1.0, 1.0), Case(64, 512, 32, 0.3, 1.0))
WAYS = {
    "products": "three bare matrix products",
    "ours": "ours, as the trainer uses it",
    "liger_scaled": "Liger's scaled cross-entropy, nll and entropy",
    "liger_scaled_torch": "the same, its fallback in torch",
    "liger": "Liger's fused cross-entropy, use_token_scaling",
    "trl": "TRL's DFT head",
    "torch_auto": "torch linear_cross_entropy",
    "torch_2048": "the same in chunks of 2048 tokens",
    "cut": "cut cross-entropy",
    "original_rows": "full logits of supervised tokens",
}
PEERS = tuple(way for way in WAYS if way not in ("products", "ours"))
CHUNKS_MB = (64, 128, 256, 512, 1024, 2048, 4096)
TINY_CHUNKS_MB = (0.016, 0.064)
ITEM_SECONDS = 60.0  # torch.compile and Triton's tuning included


def item_of(way: str, case: Case) -> str:
    """A measurement as one word for the command line of the worker."""
    return ":".join(map(str, (way, case.tokens, case.vocabulary, case.hidden, case.share, case.alpha)))


def measured_of(item: str) -> tuple[str, Case]:
    """The way and the case of such a word."""
    way, *sizes, share, alpha = item.split(":")
    return way, Case(*map(int, sizes), float(share), float(alpha))


def items(cases: tuple[Case, ...], chunks: Iterable[float]) -> list[str]:
    """All measurements, the most telling ones first: the ways in each case, then chunk sizes in the full ones."""
    ways = [item_of(way, case) for case in cases for way in WAYS]
    return ways + [item_of(f"ours_{size}", case) for case in cases if case.share == 1.0 for size in chunks]


def compared(found: dict[str, Any], case: Case) -> dict[str, Any]:
    """What one case says: ours over the bare products, over the fastest peer, and the fastest chunk size."""
    seconds = {way: numbers(found.get(item_of(way, case))).get("seconds") for way in WAYS}
    ours, products = seconds["ours"], seconds["products"]
    result: dict[str, Any] = {}
    if ours and products:
        result["ours_vs_products"] = ours / products
    peers = {way: seconds[way] for way in PEERS if seconds[way]}
    if ours and peers:
        fastest = min(peers, key=lambda way: peers[way])
        result |= {"ours_vs_fastest_peer": ours / peers[fastest], "fastest_peer": fastest}
    sweep = {measured_of(item)[0]: value for item, value in found.items() if measured_of(item)[1] == case}
    sweep = {way: numbers(value)["seconds"] for way, value in sweep.items() if way[:5] == "ours_" and numbers(value)}
    if sweep:
        best = min(sweep, key=lambda way: sweep[way])
        result |= {"best_chunk_mb": float(best.removeprefix("ours_")), "best_chunk_seconds": sweep[best]}
    return result


def measure(part: Part) -> None:
    cases, chunks = (TINY, TINY_CHUNKS_MB) if part.tiny else (CASES, CHUNKS_MB)
    item_seconds = part.seconds if part.tiny else ITEM_SECONDS
    for item, result in results_of(part, WORKER, items(cases, chunks), item_seconds):
        part.add(item, result)
        part.result["cases"] = {str(case): compared(part.measurements, case) for case in cases}
        told = part.result["cases"][str(cases[0])]
        part.headline(**{name: told[name] for name in ("ours_vs_products", "ours_vs_fastest_peer") if name in told})
    for way in ("products", "ours"):
        for case in cases:
            result = part.measurements[item_of(way, case)]
            if not numbers(result) and not reason_of(result).startswith("skipped"):
                raise RuntimeError(f"{way}, {case}: {result}")


if __name__ == "__main__":
    run("loss_head", measure)
