"""What metrics, records and curves cost, as a share of the step's time, beside TRL's SFTTrainer.

    pip install -e .[bench] -c constraints.txt
    python benchmarks/metrics_cost.py                # writes benchmarks/results/metrics_cost_cpu.md and .json
    python benchmarks/metrics_cost.py --quick        # under 2 minutes on 2 cores, writes nothing
    python benchmarks/metrics_cost.py --device cuda --size 0.6b --steps 40 --rows 16

Counted is all that compute_loss does outside the model's forward, and all of log(). Our share is that of a run that
logs every 10 steps and draws its curves every 200, with 4 sources. In another run metrics are on in every second step
only: "turns" is the median, over pairs of neighbors, of the time of a step with them over that of one without, and
"turns_low" and "turns_high" what it may be by chance (a bootstrap, 95%). The last line is JSON; shares are of the
step's time.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measuring import MAX_OTHERS, facts, keep, markdown_table, run_measured, surroundings

RUN = Path(__file__).parent / "metrics_cost_run.py"
PACKAGES = ("torch", "transformers", "accelerate", "trl", "matplotlib")
WAYS = {"ours": "ours", "ours_entropy": "ours, with entropy", "trl": "TRL (with entropy)"}
LOGGING_STEPS, SAVE_STEPS = 10, 200
TURNS = 6  # times as many steps where metrics take turns
Found = dict[str, list[dict[str, Any]]]


def measure(args: argparse.Namespace) -> Found:
    """All measurements; TRL is left out, and that is said, where it fails."""
    ways = [*WAYS, "ours_turns"]
    found: Found = {way: [] for way in ways}
    for number in range(args.rounds):
        for way in [way for way in ways if way in found]:
            steps = args.steps * TURNS if way == "ours_turns" else args.steps
            flags = ["--steps", steps, "--rows", args.rows, "--device", args.device, "--size", args.size]
            try:
                result = run_measured([sys.executable, str(RUN), way, *map(str, flags)], args.patience, tries=1)
            except SystemExit as error:
                if way != "trl":
                    raise
                del found[way]
                print(f"{way} fails: {str(error).splitlines()[-1]}", flush=True)
                continue
            found[way].append(result)
            print(f"round {number + 1}/{args.rounds}  {way:14}  others {result['others']:.0%}", flush=True)
    return found


def middle(results: list[dict[str, Any]], key: str) -> float:
    return median(result[key] for result in results)


def cost(found: Found, way: str) -> float:
    """Seconds a step."""
    drawing = middle(found["ours"], "drawing") / SAVE_STEPS if way != "trl" else 0.0
    return middle(found[way], "loss") + middle(found[way], "record") / LOGGING_STEPS + drawing


def numbers(found: Found) -> dict[str, float]:
    shares = {f"{way}_share": cost(found, way) / middle(found[way], "step") for way in WAYS if way in found}
    result = {name: round(share, 6) for name, share in shares.items()}
    if "trl" in found:
        result["ours_vs_trl_seconds"] = round(cost(found, "ours_entropy") / cost(found, "trl"), 3)
    pairs = [on / off for some in found["ours_turns"] for on, off in zip(some["with"], some["without"], strict=False)]
    again = np.median(np.random.default_rng(0).choice(pairs, (2000, len(pairs))), axis=1)
    turns = (median(pairs), *np.quantile(again, (0.025, 0.975)))
    return result | dict(zip(("turns", "turns_low", "turns_high"), (round(float(t), 4) for t in turns), strict=True))


def describe(found: Found, about: dict[str, Any], result: dict[str, float], args: argparse.Namespace) -> str:
    header = ("", "metrics of a step, ms", "a record, ms", "a drawing, ms", "a step, s", "share of the step")
    lines: list[tuple[str, ...]] = [header]
    for way, name in WAYS.items():
        if way in found:
            some = found[way]
            lines.append(
                (
                    name,
                    f"{1000 * middle(some, 'loss'):.2f}",
                    f"{1000 * middle(some, 'record'):.2f}",
                    "-" if way == "trl" else f"{1000 * middle(found['ours'], 'drawing'):.0f}",
                    f"{middle(some, 'step'):.2f}",
                    f"{result[f'{way}_share']:.3%}",
                )
            )
    return "\n\n".join(
        [
            "# What metrics cost: results",
            facts(about),
            f"Qwen3's architecture, {args.size}; steps of {args.rows} rows in one micro-batch, {args.device}; medians "
            f"of {args.steps} steps in each of {args.rounds} rounds.",
            markdown_table(lines),
            f"""\
- Share: what is counted in every step, a tenth of a record (one every {LOGGING_STEPS} steps), and 1/{SAVE_STEPS} of a
  drawing of the curves (200 records).
- Metrics in every second step only: a step with a record took {result["turns"]:.3f} times as long as its neighbor
  without metrics (median; by chance {result["turns_low"]:.3f} to {result["turns_high"]:.3f}).
- Entropy is computed with the loss, inside the forward pass: it is in the time of the step and not in its share.
- TRL records entropy, accuracy and tokens; ours are those of docs/metrics.md, also of 4 sources, with train_log.jsonl
  and a line for each record. On a processor nothing waits for a device; on a GPU that is what costs.
- No measurement waited longer than {args.patience:g} s for a share of the machine below {MAX_OTHERS:.0%}.""",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, few steps, no results written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", default="small", help="of the model, see train_step_run.py")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each measurement")
    parser.add_argument("--steps", type=int, default=12, help="of each; more where metrics take turns")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.patience, args.steps, args.rows = 1, 2, 4, 2
    found = measure(args)
    about = surroundings(PACKAGES)
    if args.device == "cuda":
        about["cpu"] = f"{about['cpu']}, {found['ours'][0]['device']}"
    result = numbers(found)
    text = describe(found, about, result, args)
    print(text)
    if not args.quick:
        keep(f"metrics_cost_{args.device}", text, about | {"ratios": result, "found": found})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
