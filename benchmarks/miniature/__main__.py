"""What DFT and its relatives do to a small language model: the whole study.

    bash benchmarks/miniature/run.sh            # under 90 minutes on 2 cores; goes on where it was stopped
    bash benchmarks/miniature/run.sh --quick    # one cell, two seeds and little training in a minute, keeps nothing

Small models in characters learn additions, subtractions, reversals and a table of facts; how many additions is the
strength of their prior. They are then fine-tuned on one kind of data by every objective, at the learning rate that is
best for it. Writes benchmarks/results/miniature.md and .json, and docs/evidence_*.png. The last line is JSON.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, facts, keep, surroundings
from benchmarks.miniature.report import BASE, figures, summarize, tables
from benchmarks.miniature.study import FULL, QUICK, run_study
from benchmarks.miniature.tasks import OTHER_SKILLS

PACKAGES = ("torch", "transformers", "accelerate", "numpy")
ABOUT = """\
Means of {seeds} seeds, each with a base model of its own. target: right answers in what was trained; kept: mean of
subtraction, reversal and facts; longer: additions of three digits; wording: the target in the other wording; ends: the
right answer is followed by the end token. All in %, by greedy search on problems that no training has seen; facts are
those that were learned. CE: of the target's tokens, right answers; ECE: expected calibration error of its tokens.
rate: of 4 learning rates, on validation problems and with two other seeds, those whose target is within a point of the
best, and of these the one that keeps most; * is the lowest or highest of the four. "− SFT": percentage points, paired
by seed, with a 95% interval by Student's t; bold where it leaves out 0. With so many comparisons, about one in twenty
is bold by chance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one cell, two seeds, nothing kept")
    parser.add_argument("--directory", type=Path, help="of base models and runs.jsonl")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, by default one for each core")
    args = parser.parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory() as directory:
            runs = args.directory or Path(directory)
            records = run_study(QUICK, runs, args.workers)
            summary = summarize(QUICK, records)
            figures(QUICK, records, summary, runs)
        text = tables(QUICK, summary)
    else:
        records = run_study(FULL, args.directory or ROOT / "outputs" / "miniature", args.workers)
        summary = summarize(FULL, records)
        figures(FULL, records, summary, ROOT / "docs")
        about = surroundings(PACKAGES)
        hours = sum(record["seconds"] for record in records) / 3600
        told = f"{len(records)} runs, {hours:.1f} hours of one core. {skills_of_bases(records)}"
        text = "\n\n".join(
            ["# A study in miniature", ABOUT.format(seeds=len(FULL.seeds)), told, tables(FULL, summary), facts(about)]
        )
        keep("miniature", text, {"about": about, "summary": summary})
    print(text)
    gains = {
        f"{line['prior']}, {line['data']}": round(line["target - sft"][0], 4)
        for line in summary
        if line["objective"] == "dft 1"
    }
    print(json.dumps({"dft_1_minus_sft_target": gains}))


def skills_of_bases(records: list[dict[str, Any]]) -> str:
    """A sentence on what the base models know of the other skills, from the least to the most of all of them."""
    bases = [record for record in records if record["objective"] == BASE]
    values = {name: [100 * base[name] for base in bases] for name in OTHER_SKILLS}
    ranges = [f"{name} in {min(found):.0f} to {max(found):.0f}%" for name, found in values.items()]
    return f"The base models are right in {', '.join(ranges[:-1])} and {ranges[-1]}."


if __name__ == "__main__":
    main()
