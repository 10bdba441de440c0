"""CPU time until --help, a wrong flag and a wrong value are answered, beside the imports of the libraries below them.

    pip install -e . -c constraints.txt
    python benchmarks/start_time.py            # writes benchmarks/results/start_time.md and .json
    python benchmarks/start_time.py --quick    # one round, writes nothing

CPU time (user and system) of the process and its children, so that waiting for a disk or for other programs doesn't
count; medians over rounds. The last line is JSON: each answer as a share of `python -c "import transformers"`, and of
importing what a training run needs (torch, transformers.Trainer, deepspeed).
"""

import argparse
import json
import resource
import subprocess
import sys
from statistics import median

from benchmarks.measuring import ROOT, facts, keep, markdown_table, surroundings

REQUIRED = ["--model_name_or_path", "m", "--data_files", "d.jsonl"]
TRAINING = "import torch, deepspeed; from transformers import Trainer"
COMMANDS = {
    "--help": ["train_dft.py", "--help"],
    "a wrong flag": ["train_dft.py", *REQUIRED, "--dft_alfa", "1"],
    "a wrong value": ["train_dft.py", *REQUIRED, "--dft_alpha", "2"],
    "a wrong value of a training flag": ["train_dft.py", *REQUIRED, "--learning_rate", "-1"],
    "python alone": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import transformers": ["-c", "import transformers"],
    "what a training imports": ["-c", TRAINING],
}
ANSWERS = list(COMMANDS)[:4]
STATUS = {"--help": 0, "a wrong flag": 2, "a wrong value": 2, "a wrong value of a training flag": 2}


def cpu_seconds(command: list[str], status: int) -> float:
    """User and system time of a Python command, which must end with this exit status."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != status:
        raise SystemExit(f"{command} ended with status {result.returncode}:\n{result.stderr[-2000:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, no results written")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    for name, command in COMMANDS.items():  # once before, so that files are in the disk cache and compiled
        cpu_seconds(command, STATUS.get(name, 0))
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            found[name].append(cpu_seconds(command, STATUS.get(name, 0)))
    seconds = {name: median(times) for name, times in found.items()}
    ratios = {}
    for name in ANSWERS:
        ratios[f"{name}_vs_import_transformers"] = round(seconds[name] / seconds["import transformers"], 3)
        ratios[f"{name}_vs_training_imports"] = round(seconds[name] / seconds["what a training imports"], 3)
    about = surroundings(("torch", "transformers", "accelerate", "deepspeed"))
    lines = [("", "CPU seconds, median", "least", "most")]
    lines += [(n, *(f"{value:.2f}" for value in (seconds[n], min(found[n]), max(found[n])))) for n in COMMANDS]
    text = "\n\n".join(
        ["# Time to an answer: results", facts(about), f"{rounds} rounds, CPU time.", markdown_table(lines)]
    )
    print(text)
    if not args.quick:
        keep("start_time", text, about | {"ratios": ratios, "seconds": found})
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
