"""Faults in a save of a real run: all processes are killed at each file that it writes; the disk is full.

    pip install -e ".[dev]" -c constraints.txt
    python benchmarks/faults_in_save.py                                 # ZeRO-3 on 2 processes, every point: minutes
    python benchmarks/faults_in_save.py --launcher python --points 3    # one process, three points

A run of 4 steps has a checkpoint of step 2; the save of step 4 is hit. Then --resume_from_checkpoint last has to go
on, and to end with the weights and the records of a run that nothing has hit, bit for bit. The full disk is a tmpfs,
which only root can mount. For others, no file can grow to the size of the optimizer, so that the first save fails and
nothing is there to go on from. The last line is JSON; the status is 1 if anything was otherwise.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import ROOT, markdown_table
from examples.make_example_data import facts_en
from examples.make_tiny_model import make_model, make_tokenizer, strings

STEPS = 4
TIMING = ("tokens_per_second", "supervised_tokens_per_second", "memory_gib")
STAGED = f"_unfinished/checkpoint-{STEPS}"


@dataclass
class Run:
    """A run in a directory of its own.

    Args:
        place: the directory, which holds the model and the data as `model` and `data.jsonl` beside it.
        launcher: as scripts/train.sh knows it.
    """

    place: Path
    launcher: str

    @property
    def out(self) -> Path:
        """Where the run writes to."""
        return self.place / "out"

    def start(self, *flags: str, limit: int | None = None) -> subprocess.Popen:
        """Starts the run; `limit` is the largest file that it can write, in KiB."""
        flags = (*("--model_name_or_path", str(self.place.parent / "model")), *flags)
        flags += ("--data_files", str(self.place.parent / "data.jsonl"), "--output_dir", str(self.out))
        flags += ("--torch_dtype", "float32", "--max_steps", str(STEPS), "--save_steps", "2", "--logging_steps", "1")
        flags += (
            "--per_device_train_batch_size",
            "2",
            "--learning_rate",
            "1e-2",
            "--validation_split_percentage",
            "0",
        )
        self.place.mkdir(exist_ok=True)
        shell = f'ulimit -f {limit or "unlimited"}; exec bash scripts/train.sh "$@"'
        env = {"LAUNCHER": self.launcher, "NPROC": "2", "LOG_DIR": str(self.place.parent / "logs")}
        with open(self.place.parent / f"{self.place.name}.txt", "a") as output:
            return subprocess.Popen(
                ["bash", "-c", shell, "bash", *flags], cwd=ROOT, env=os.environ | env, stdout=output, stderr=output
            )

    def output(self) -> str:
        """What it has printed."""
        return (self.place.parent / f"{self.place.name}.txt").read_text(errors="replace")

    def result(self) -> tuple[bytes, list[dict[str, Any]]]:
        """The final weights, and the records of the steps without what a clock told."""
        lines = (self.out / "train_log.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if "grad_norm" in record]
        return (self.out / "model.safetensors").read_bytes(), [
            {name: value for name, value in record.items() if name not in TIMING} for record in records
        ]


def kill_at(run: Run, count: int) -> int:
    """Starts a run and kills all its processes when its second save has so many files; returns how many there are."""
    process = run.start()
    staged = run.out / STAGED
    while process.poll() is None:
        if staged.is_dir() and sum(path.is_file() for path in staged.rglob("*")) >= count:
            break
        time.sleep(0.0005)
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in processes:
        if one.is_running():
            os.kill(one.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(processes, timeout=30)
    return sum(path.is_file() for path in staged.rglob("*"))


def goes_on(run: Run, expected: tuple[bytes, list[dict[str, Any]]]) -> str:
    """Resumes a run, and says what came of it."""
    status = run.start("--resume_from_checkpoint", "last").wait()
    if status:
        return f"status {status}"
    weights, records = run.result()
    return "the same" if (weights, records) == expected else "another result"


def full_disk(run: Run, files: dict[str, dict[str, Any]], expected: tuple) -> tuple[str, str, str]:
    """A disk that has room for one checkpoint, and then for all of them; what came of it."""
    size = sum(entry["size"] for entry in files.values())
    run.out.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size)}", "tmpfs", str(run.out)]
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        largest = max(entry["size"] for entry in files.values())
        return "no file can be as large as the optimizer", fails(run, limit=largest // 1024 - 1), "not tried"
    try:
        failed = fails(run)
        subprocess.run(["mount", "-o", f"remount,size={20 * size + (1 << 24)}", str(run.out)], check=True)
        return "the disk is full", failed, goes_on(run, expected)
    finally:
        subprocess.run(["umount", str(run.out)], check=True)


def fails(run: Run, limit: int | None = None) -> str:
    """Runs into a disk that is full, and says what came of it."""
    status = run.start(limit=limit).wait()
    left = sorted(path.name for path in run.out.glob("checkpoint-*"))
    is_told = f"{run.out}/checkpoint-" in run.output() and "Earlier ones" in run.output()
    return f"status {status}, path {'told' if is_told else 'not told'}, {' '.join(left) or 'nothing'} left"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", default="deepspeed", choices=("deepspeed", "torchrun", "python"))
    parser.add_argument("--points", type=int, help="how many of the points to try, evenly spread; by default all")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    make_tokenizer(strings(facts_en()[:40]), vocab_size=600).save_pretrained(place / "model")
    make_model(600, hidden_size=32, num_layers=2).save_pretrained(place / "model")
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts_en()[:40]))
    whole = Run(place / "whole", args.launcher)
    if whole.start().wait():
        sys.exit(whole.output())
    expected = whole.result()
    files = json.loads((whole.out / f"checkpoint-{STEPS}" / "manifest.json").read_text())["files"]
    points = list(range(len(files) + 2))  # none, each file, and the manifest
    if args.points is not None:
        points = [points[i * (len(points) - 1) // max(args.points - 1, 1)] for i in range(args.points)]
    lines = [("what was done", "what was there", "resumed")]
    for point in points:
        run = Run(place / f"killed-{point}", args.launcher)
        found = kill_at(run, point)
        lines.append((f"killed at {point} of {len(files) + 1} files", f"{found} files", goes_on(run, expected)))
        print(*lines[-1], sep=": ", flush=True)
    lines.append(full_disk(Run(place / "full-disk", args.launcher), files, expected))
    print(markdown_table(lines))
    same = sum(line[2] == "the same" for line in lines)
    is_told = lines[-1][1].startswith("status 1, path told")
    print(json.dumps({"tried": len(lines) - 1, "the_same": same, "full_disk_is_told": is_told}))
    if not is_told or any(line[2] not in ("the same", "not tried") for line in lines[1:]):
        sys.exit(f"the runs and what they printed are in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
