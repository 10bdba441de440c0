"""Tokens a second of a whole training step, beside the original's recipe and TRL's SFTTrainer; and of packing alone.

    pip install -e .[bench] -c constraints.txt
    python benchmarks/train_step.py                           # writes benchmarks/results/train_step_cpu.md and .json
    python benchmarks/train_step.py --quick                   # under 2 minutes on 2 cores, writes nothing
    python benchmarks/train_step.py --device cuda --size 0.6b --steps 20 --rows_per_step 64

All train the same model from the same rows with AdamW and the DFT loss, alpha = 1. Every measurement is a process of
its own (train_step_run.py), the ways take turns, and the median of the rounds counts. The last line is JSON:
"ours_vs_X" is how many times as fast as X our default (padding-free) is, "packed_vs_X" the same for our packed
batches; above 1 we are faster.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measuring import MAX_OTHERS, facts, keep, markdown_table, run_measured, surroundings
from dft.batching.packing import best_fit_decreasing
from dft.metrics.throughput import PEAK_TFLOPS

RUN = Path(__file__).parent / "train_step_run.py"
PACKAGES = ("torch", "transformers", "accelerate", "trl", "datasets", "triton", "flash-attn")
WAYS = {
    "ours_padding_free": "ours, padding-free",
    "ours_packed": "ours, packed",
    "ours_padded-grouped": "ours, padded, grouped by length",
    "original_1": "the original's recipe, 1 row a micro-batch",
    "original_8": "the original's recipe, 8 rows",
    "trl_padded": "TRL, padded",
    "trl_padded-grouped": "TRL, padded, grouped by length",
    "trl_padding_free": "TRL, padding-free",
    "trl_packed": "TRL, packed (bfd)",
}
QUICK = ("ours_padding_free", "ours_packed", "original_1", "trl_packed")
Found = dict[str, list[dict[str, Any]]]


def measure(ways: tuple[str, ...], args: argparse.Namespace) -> Found:
    """All measurements of all ways; a way that fails is left out, and said."""
    found: Found = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in [way for way in ways if way in found]:
            flags = ["--steps", args.steps, "--rows_per_step", args.rows_per_step, "--device", args.device]
            flags += ["--size", args.size, "--trl_attention", args.trl_attention]
            try:
                result = run_measured([sys.executable, str(RUN), way, *map(str, flags)], args.patience, tries=1)
            except SystemExit as error:
                del found[way]
                print(f"{way} fails: {str(error).splitlines()[-1]}", flush=True)
                continue
            found[way].append(result)
            print(
                f"round {number + 1}/{args.rounds}  {way:20}  {speed(result):8.0f} tokens/s  "
                f"others {result['others']:.0%}",
                flush=True,
            )
    return found


def speed(result: dict[str, Any]) -> float:
    return result["tokens"] / result["seconds"]


def check_same_work(found: Found) -> None:
    """Stops unless all ways saw the same tokens, and those with the same first step had the same loss."""
    results = {way: some[0] for way, some in found.items() if some}
    assert len({result["all_tokens"] for result in results.values()}) == 1, results
    losses = [r["loss"] for way, r in results.items() if not way.endswith(("packed", "grouped"))]
    assert max(losses) / min(losses) - 1 < 1e-3, losses


def ratios(found: Found) -> dict[str, float]:
    result = {}
    for name, ours in (("ours", "ours_padding_free"), ("packed", "ours_packed")):
        for way in found:
            if way != ours and ours in found:
                result[f"{name}_vs_{way}"] = round(middle(found[ours]) / middle(found[way]), 3)
    return result


def middle(results: list[dict[str, Any]]) -> float:
    return median(map(speed, results))


def pack_many(count: int = 100_000, capacity: int = 8192) -> dict[str, float]:
    """Sequences a second and fill, ours and TRL's, with lengths as those of chats."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, count), 8, capacity).astype(np.int32)
    start = time.perf_counter()
    bins = best_fit_decreasing(lengths, capacity)
    result = {"count": count, "pack_per_second": count / (time.perf_counter() - start)}
    result["pack_fill"] = lengths.sum() / ((bins.max() + 1) * capacity)
    try:
        from datasets import Dataset
        from trl.data_utils import pack_dataset
    except ImportError:
        return result
    data = Dataset.from_dict({"input_ids": [np.zeros(length, dtype=np.int32) for length in lengths]})
    start = time.perf_counter()
    packed = pack_dataset(data, capacity, "bfd")
    result["trl_pack_per_second"] = count / (time.perf_counter() - start)
    result["trl_pack_fill"] = lengths.sum() / (len(packed) * capacity)
    return result


def describe(found: Found, about: dict[str, Any], packing: dict[str, float], args: argparse.Namespace) -> str:
    """Everything that is known, for people."""
    header = ("", "tokens/s", "least–most", "padding", "seconds a step", "memory, MiB")
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in about["device"]), None)
    lines: list[tuple[str, ...]] = [(*header, "MFU") if peak else header]
    for way, results in found.items():
        first, speeds = results[0], [speed(result) for result in results]
        cells = (
            WAYS[way],
            f"{median(speeds):,.0f}",
            f"{min(speeds):,.0f}–{max(speeds):,.0f}",
            f"{1 - first['tokens'] / first['positions']:.0%}",
            f"{median(result['seconds'] / result['steps'] for result in results):.2f}",
            f"{median(result['memory_mib'] for result in results):,.0f}",
        )
        mfu = median(result["tflops"] / result["seconds"] for result in results) / (peak or 1)
        lines.append((*cells, f"{mfu:.1%}") if peak else cells)
    tokens = next(iter(found.values()))[0]["all_tokens"]
    rows = args.steps * args.rows_per_step
    packed = [
        ("", "sequences/s", "fill"),
        ("ours", f"{packing['pack_per_second']:,.0f}", f"{packing['pack_fill']:.2%}"),
    ]
    if "trl_pack_fill" in packing:
        packed.append(("TRL", f"{packing['trl_pack_per_second']:,.0f}", f"{packing['trl_pack_fill']:.2%}"))
    return "\n\n".join(
        [
            "# A training step: results",
            facts(about),
            f"Qwen3's architecture, {args.size}; {rows} rows with {tokens:,} tokens (log-normal lengths, a median of "
            f"150 tokens, cut at 1024; 40% supervised), {args.rows_per_step} rows a step, 8 a micro-batch where "
            f"nothing else is said; packed rows hold 1024 tokens. {args.device}, median of {args.rounds} rounds.",
            markdown_table(lines),
            f"""\
- The first step isn't measured. Tokens are real ones, without padding. Nobody recomputes activations.
- Attention: ours varlen, the original's sdpa, TRL's {"sdpa" if args.device == "cpu" else args.trl_attention}.
- The original's loss is written after its documents, in a Trainer that counts tokens over the step. Without padding
  (1 row a micro-batch) it does the same products as ours but for the head, where it scores every token.
- Packed ways have as many tokens in a step as the others have on average, but other rows in each.
- Programs beside it: no measurement waited longer than {args.patience:g} s for a share of the machine below
  {MAX_OTHERS:.0%}.""",
            "## Packing alone",
            f"{packing['count']:,.0f} sequences, log-normal lengths (a median of 245 tokens), into rows of 8192 "
            "tokens. TRL's makes the packed rows' tokens as well; ours are put together when they are read.",
            markdown_table(packed),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four ways, one round, few steps, no results written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", default="small", help="of the model, see train_step_run.py")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=tuple(WAYS), help="what is measured")
    parser.add_argument("--trl_attention", default="flash_attention_2", help="of TRL on a GPU")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each measurement")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each, the first of them not measured")
    parser.add_argument("--rows_per_step", type=int, default=16)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    args = parser.parse_args()
    ways = tuple(args.ways)
    if args.quick:
        args.rounds, args.patience, args.steps, ways = 1, 2, 3, QUICK
    found = measure(ways, args)
    check_same_work(found)
    packing = pack_many(20_000 if args.quick else 100_000)
    about = surroundings(PACKAGES) | {"device": next(iter(found.values()))[0]["device"]}
    if args.device == "cuda":
        about["cpu"] = f"{about['cpu']}, {about['device']}"
    numbers = ratios(found) | {name: round(value, 4) for name, value in packing.items()}
    text = describe(found, about, packing, args)
    print(text)
    if not args.quick:
        name = f"train_step_{args.device}" + ("" if args.size == "small" else f"_{args.size}")
        keep(name, text, about | {"ratios": numbers, "found": found})
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
