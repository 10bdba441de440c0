"""Time and memory of the DFT loss with its gradients, beside its peers and three bare matrix products.

    pip install -e .[bench] -c constraints.txt
    python benchmarks/loss_head.py                  # writes benchmarks/results/loss_head_cpu.md, .json and .png
    python benchmarks/loss_head.py --quick          # one small case, under 2 minutes on 2 cores, writes nothing
    python benchmarks/loss_head.py --device cuda    # 16 bits, large vocabularies; Liger too

Every measurement is a process of its own (loss_head_ops.py), the ways take turns, and the median of the rounds
counts. The last line is JSON: "time_vs_X" and "memory_vs_X" are our share of what X takes, so below 1 we are better.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.measuring import MAX_OTHERS, RESULTS, facts, keep, markdown_table, run_measured, surroundings

OPS = Path(__file__).parent / "loss_head_ops.py"
PACKAGES = ("torch", "transformers", "trl", "cut-cross-entropy", "liger-kernel", "triton")
OURS = {"cpu": "fused_48", "cuda": "fused_1024"}  # the default
NAMES = {
    "gemms": "three bare matrix products",
    "original": "the original's code",
    "original_rows": "the same, supervised rows only",
    "compiled": "the original's code, torch.compile",
    "trl": "TRL's head",
    "torch_auto": "torch linear_cross_entropy, auto",
    "torch_2048": "torch linear_cross_entropy, 2048",
    "cut": "cut cross-entropy",
    "liger": "Liger, alpha = 1",
    "fused_16": "ours, 16 MB of logits",
    "fused_48": "ours, 48 MB",
    "fused_256": "ours, 256 MB",
    "fused_1024": "ours, 1024 MB",
}


class Case(NamedTuple):
    tokens: int
    vocabulary: int
    hidden: int
    share: float
    alpha: float = 0.7

    def __str__(self) -> str:
        return (
            f"N {self.tokens}, V {self.vocabulary}, H {self.hidden}, {self.share:.0%} supervised, alpha {self.alpha:g}"
        )


BASE = Case(1024, 32000, 256, 1.0)
QUARTER = BASE._replace(share=0.25)
LONG = BASE._replace(tokens=4096)
CPU_CASES = (BASE, QUARTER, LONG, BASE._replace(alpha=1.0), BASE._replace(hidden=512), Case(512, 151936, 256, 1.0))
CUDA_CASES = (Case(8192, 151936, 4096, 1.0, 1.0), Case(8192, 151936, 4096, 0.25), Case(8192, 32000, 2048, 1.0))
CPU_WAYS = ("gemms", "original", "original_rows", "compiled", "trl", "torch_auto", "torch_2048", "cut")
CPU_WAYS += ("fused_16", "fused_48", "fused_256")
CUDA_WAYS = (*CPU_WAYS[:-3], "liger", "fused_48", "fused_256", "fused_1024")
Found = dict[tuple[Case, str], dict[str, float]]


def measure(cases: tuple[Case, ...], ways: tuple[str, ...], args: argparse.Namespace) -> Found:
    """Medians of every way in every case; a way that fails is left out, and said."""
    found: dict[tuple[Case, str], list[dict[str, float]]] = {}
    failed: set[tuple[Case, str]] = set()
    for number in range(args.rounds):
        for case in cases:
            for way in ways:
                if (case, way) in failed:
                    continue
                sizes = ["--n", case.tokens, "--v", case.vocabulary, "--h", case.hidden]
                flags = [*sizes, "--share", case.share, "--alpha", case.alpha, "--device", args.device]
                flags += ["--dtype", "bfloat16" if args.device == "cuda" else "float32", "--times", args.times]
                if number == 0 and case == cases[0]:
                    flags.append("--error")
                try:
                    result = run_measured([sys.executable, str(OPS), way, *map(str, flags)], args.patience, tries=1)
                except SystemExit as error:
                    failed.add((case, way))
                    print(f"{way} fails in the case {case}: {str(error).splitlines()[-1]}", flush=True)
                    continue
                found.setdefault((case, way), []).append(result)
                print(
                    f"round {number + 1}/{args.rounds}  {case}  {way:13}  {result['seconds']:7.3f} s  "
                    f"{result['memory'] / 1e6:6.0f} MB  others {result['others']:.0%}",
                    flush=True,
                )
    return {
        key: {name: median(r[name] for r in results if name in r) for name in results[0]}
        for key, results in found.items()
    }


def ratios(found: Found, cases: tuple[Case, ...], ways: tuple[str, ...], ours_is: str) -> dict[str, float]:
    """Ours, which is the way `ours_is`, over the others', by case."""
    result: dict[str, float] = {}
    for case in cases:
        if (case, ours_is) not in found:
            continue
        name = f"n{case.tokens}_v{case.vocabulary}_h{case.hidden}_{case.share:.0%}_alpha{case.alpha:g}".replace(
            "%", "pct"
        )
        ours = found[case, ours_is]
        for way in ways:
            if (case, way) in found and not way.startswith("fused"):
                other = found[case, way]
                result[f"{name}_time_vs_{way}"] = round(ours["seconds"] / other["seconds"], 3)
                if other["memory"] > 0:
                    result[f"{name}_memory_vs_{way}"] = round(ours["memory"] / other["memory"], 3)
    return result


def describe(found: Found, cases: tuple[Case, ...], about: dict[str, Any], args: argparse.Namespace) -> str:
    """Everything that is known, for people."""
    precision = "bfloat16 weights and hidden states" if args.device == "cuda" else "float32, one thread"
    parts = ["# The loss and its gradients: results", facts(about), f"Forward and backward, {precision}."]
    for case in cases:
        lines: list[tuple[str, ...]] = [("", "seconds", "× bare products", "memory, MB", "error")]
        for way, name in NAMES.items():
            if (case, way) not in found:
                continue
            result = found[case, way]
            error = max(result.get("error_hidden", 0.0), result.get("error_weight", 0.0))
            limit = found[case, "gemms"]["seconds"]
            numbers = (
                f"{result['seconds']:.3f}",
                f"{result['seconds'] / limit:.2f}",
                f"{result['memory'] / 1e6:,.0f}",
            )
            lines.append((name, *numbers, f"{error:.1e}" if error else ""))
        parts += [f"## {case}", markdown_table(lines)]
    of_head = cases[0].vocabulary * cases[0].hidden * 4 / 1e6
    parts.append(
        f"""\
- Seconds: median of {args.times} passes in each of {args.rounds} processes.
- Memory: the most at any time above the inputs; it holds the gradients ({of_head:.0f} MB for the head, first case).
- Bare products: of supervised tokens only, and nothing else; all logits at once.
- Error: of the gradients, relative to float64, the greater of the two; in the first case.
- The original's code is written after its documents. TRL, torch and cut cross-entropy give a loss for every token, to
  which the weights are applied outside; TRL without Triton scores every position, as here, and with it the supervised
  ones. Cut cross-entropy without a GPU is its torch.compile form.
- Random hidden states; every second token is likely. Programs beside it: no measurement waited longer than
  {args.patience:g} s for a share of the machine below {MAX_OTHERS:.0%}."""
    )
    return "\n\n".join(parts)


def draw(found: Found, case: Case, path: Path) -> None:
    """Time and memory of every way in one case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = [way for way in reversed(NAMES) if (case, way) in found]
    colors = ["#c44e52" if w.startswith("fused") else "#8c8c8c" if w == "gemms" else "#4c72b0" for w in ways]
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.4 * len(ways) + 1.2), sharey=True, layout="constrained")
    for panel, key, unit, label in zip(
        panels, ("seconds", "memory"), (1, 1e6), ("seconds, forward + backward", "peak memory, MB"), strict=True
    ):
        bars = panel.barh([NAMES[w] for w in ways], [found[case, w][key] / unit for w in ways], color=colors)
        panel.bar_label(bars, fmt="%.2f" if unit == 1 else "%.0f", padding=3)
        panel.set_xlabel(label)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(str(case))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, one round, no results written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each measurement")
    parser.add_argument("--times", type=int, default=3, help="passes in each process")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    args = parser.parse_args()
    cases, ways = (CUDA_CASES, CUDA_WAYS) if args.device == "cuda" else (CPU_CASES, CPU_WAYS)
    if args.quick:
        args.rounds, args.patience = 1, 2
        cases, ways = (BASE,), ("gemms", "original", "trl", "torch_2048", OURS[args.device])
    found = measure(cases, ways, args)
    about = surroundings(PACKAGES)
    if args.device == "cuda":
        import torch

        about["cpu"] = f"{about['cpu']}, {torch.cuda.get_device_name()}"
    text = describe(found, cases, about, args)
    numbers = ratios(found, cases, ways, OURS[args.device])
    print(text)
    if not args.quick:
        rows = [case._asdict() | {"way": way} | result for (case, way), result in found.items()]
        RESULTS.mkdir(exist_ok=True)
        name = f"loss_head_{args.device}"
        draw(found, LONG if args.device == "cpu" else cases[0], RESULTS / f"{name}.png")
        keep(name, text, about | {"ratios": numbers, "found": rows})
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
