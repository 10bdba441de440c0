"""Faults of real runs, and what comes of them: kills, signals, lost ranks, full disks, damaged checkpoints.

    pip install -e ".[dev]" -c constraints.txt
    python benchmarks/faults.py                     # everything: an hour; writes benchmarks/results/faults_cpu.*
    python benchmarks/faults.py --parts killed      # one part; writes its lines into the same file
    python benchmarks/faults.py --parts killed --tries 3 --launcher python    # in short; writes nothing

Each part hurts small runs that scripts/train.sh has started, by default with ZeRO-3 on two processes and packed rows,
and compares what comes of them with a run that nothing has hit: the final weights and the records of all steps, bit
for bit. The full disks are a tmpfs, which only root can mount. What is asked of each part is in PARTS. The last line
is JSON; the status is 1 if anything was otherwise.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faulty_files import damaged, flipped, foreign, with_code
from benchmarks.faulty_runs import (
    END_SECONDS,
    LAUNCHERS,
    SAVE_STEPS,
    STEPS,
    Result,
    Run,
    kill_all,
    make_inputs,
    ranks_of,
    wait_for,
)
from benchmarks.measuring import RESULTS, facts, keep, markdown_table, surroundings
from dft.checkpoints.resume import find_newest
from dft.errors import UserError

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed")
SECOND_SAVE = 2 * SAVE_STEPS
ALL = 1000  # more tries than any part has
LONG = 4000  # steps of a run that is to be ended before its last one
MOST_GROWTH = 20.0  # MB of resident memory in all saves but the first hundred
FIRST_SAVES = 100
END_OF_STEP_SECONDS, NAMED_SECONDS, HUNG_SECONDS = 30.0, 60.0, 90.0

ABOUT = (
    "Small runs that scripts/train.sh has started with packed rows were hurt, and what came of them was compared with "
    "a run that nothing had hit: the final weights and the records of all steps, bit for bit."
)

Line = tuple[str, str, bool]  # what was done, what came of it, whether that was asked for


@dataclass
class Whole:
    """A run that nothing has hit.

    Attributes:
        seconds: from its first checkpoint to its last one.
        num_files: of a checkpoint, with its manifest; size: in bytes.
    """

    run: Run
    result: Result
    seconds: float
    num_files: int
    size: int

    def another(self, name: str, **settings: Any) -> Run:
        """A run with the same flags, but for some."""
        return Run(self.run.place.parent / name, self.run.launcher, settings)


def run_whole(place: Path, launcher: str) -> Whole:
    """The run that the others are compared with."""
    make_inputs(place)
    run = Run(place / "whole", launcher)
    if run.finish():
        sys.exit(run.output())
    first, *_, last = sorted((run.out / f"checkpoint-{n}").stat().st_mtime for n in range(SAVE_STEPS, STEPS + 1, 4))
    entries = json.loads((run.out / f"checkpoint-{STEPS}" / "manifest.json").read_text())["files"].values()
    return Whole(run, run.result(), last - first, len(entries) + 1, sum(entry["size"] for entry in entries))


# ---- what is done to a run ------------------------------------------------------------------------


def killed(whole: Whole, tries: int) -> list[Line]:
    """All processes are killed: in two of five tries in the second save, else at a random moment after the first."""
    moments, lines = random.Random(0), []
    in_saves = round(0.4 * tries)
    for i in range(tries):
        run = whole.another(f"killed-{i}")
        process = run.start()
        if i < in_saves:
            count = i * whole.num_files // max(in_saves - 1, 1)
            wait_for(lambda run=run, count=count: run.staged_files(SECOND_SAVE) >= max(count, 1), process)
        else:
            wait_for((run.out / f"checkpoint-{SAVE_STEPS}").is_dir, process)
            time.sleep(moments.uniform(0, whole.seconds))
        kill_all(process)
        staged = [path.name for path in run.out.glob("_unfinished/checkpoint-*")]
        where = f"in a save, {run.staged_files(SECOND_SAVE)} of {whole.num_files} files" if staged else "between saves"
        outcome = run.resumed(whole.result)
        lines.append((f"killed {where}", outcome, outcome == "the same"))
    return lines


def stopped(whole: Whole, tries: int) -> list[Line]:
    """The launch script gets TERM at a random moment: a whole checkpoint within 30 s, and status 143."""
    moments = random.Random(1)
    run = partial(_ended, whole, hit=lambda process: process.send_signal(signal.SIGTERM))
    return [("TERM", *run(name=f"stopped-{i}", wait=moments.uniform(0, 3))) for i in range(tries)]


def without_launcher(whole: Whole, tries: int) -> list[Line]:
    """The process that started the ranks is killed: they end as after TERM."""

    def hit(process: subprocess.Popen) -> None:
        psutil.Process(ranks_of(process)[0].ppid()).kill()

    return [("the launcher killed", *_ended(whole, name=f"launcher-{i}", wait=0, hit=hit)) for i in range(tries)]


def _ended(whole: Whole, *, name: str, wait: float, hit: Callable[[subprocess.Popen], None]) -> tuple[str, bool]:
    """What comes of a run that is hit `wait` seconds after its first step, and whether that was asked for."""
    run = whole.another(name, max_steps=LONG, save_steps=LONG)
    process = run.start()
    wait_for(lambda: run.steps_logged() > 0, process)
    time.sleep(wait)
    hit(process)
    start = time.monotonic()
    status = process.wait(timeout=END_SECONDS)
    seconds = time.monotonic() - start
    try:
        saved = find_newest(run.out).name
    except UserError as error:
        saved = str(error)
    is_told = f"{run.out / saved}; go on with" in run.output()
    outcome = f"status {status} after {seconds:.0f} s, {saved}, {'told' if is_told else 'not told'}"
    return outcome, status == 143 and is_told and seconds < END_OF_STEP_SECONDS


def lost(whole: Whole, tries: int) -> list[Line]:
    """One rank is killed: the others end within a minute, and say which it was."""
    return [_without_rank(whole, i, signal.SIGKILL, NAMED_SECONDS) for i in range(tries)]


def hung(whole: Whole, tries: int) -> list[Line]:
    """One rank is stopped and never goes on: it is named within 90 seconds."""
    return [_without_rank(whole, i, signal.SIGSTOP, HUNG_SECONDS) for i in range(tries)]


def _without_rank(whole: Whole, number: int, what: signal.Signals, limit: float) -> Line:
    run = whole.another(f"{what.name}-{number}", max_steps=LONG, save_steps=LONG)
    process = run.start()
    wait_for(lambda: run.steps_logged() > 0, process)
    rank = number % 2
    os.kill(ranks_of(process)[rank].pid, what)
    start = time.monotonic()
    # as our message has it, or torchrun's table
    named = re.compile(rf"(error:|ERROR -) rank {rank}\b|rank\s+: {rank} ")
    while time.monotonic() - start < limit and not (named.search(run.output()) and process.poll() is not None):
        if what is signal.SIGSTOP and named.search(run.output()):
            break
        time.sleep(0.2)
    seconds, status = time.monotonic() - start, process.poll()
    if status is None:
        kill_all(process)
    is_named = bool(named.search(run.output()))
    done = f"{what.name} of rank {rank}"
    if what is signal.SIGSTOP:
        return done, f"{'named' if is_named else 'not named'} after {seconds:.0f} s", is_named
    outcome = f"status {status} after {seconds:.0f} s, {'named' if is_named else 'not named'}"
    return done, outcome, is_named and status not in (None, 0)


def full_disk(whole: Whole, tries: int) -> list[Line]:
    """A disk has room for one checkpoint and a part of the next: that is told, nothing is lost, and `last` goes on.

    In every second try, another program takes the room only when the save has begun.
    """
    return [_on_full_disk(whole, i, has_room_at_first=i % 2 == 1) for i in range(tries)]


def _on_full_disk(whole: Whole, number: int, *, has_room_at_first: bool) -> Line:
    run = whole.another(f"full-{number}")
    run.out.mkdir(parents=True)
    room = 6 * whole.size if has_room_at_first else int((1.2 + 0.15 * number) * whole.size)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(run.out)]
    done = "another program fills the disk during a save" if has_room_at_first else "no room for a second checkpoint"
    if os.geteuid() != 0 or subprocess.run(mount).returncode:
        return done, "not tried: only root can mount a disk of a given size", True
    try:
        process = run.start()
        if has_room_at_first:
            wait_for(lambda: run.staged_files(SECOND_SAVE) > number, process)
            subprocess.run(["dd", "if=/dev/zero", f"of={run.out / 'ballast'}", "bs=4k"], stderr=subprocess.DEVNULL)
        status = process.wait(timeout=END_SECONDS)
        left = sorted(path.name for path in run.out.glob("checkpoint-*"))
        is_told = str(run.out / "checkpoint-") in run.output() and "Earlier ones" in run.output()
        (run.out / "ballast").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", f"remount,size={40 * whole.size + (1 << 25)}", str(run.out)], check=True)
        again = run.resumed(whole.result)
    finally:
        subprocess.run(["umount", "--lazy", str(run.out)], check=True)
    outcome = f"status {status}, path {'told' if is_told else 'not told'}, {' '.join(left) or 'nothing'} left; {again}"
    return done, outcome, status == 1 and is_told and left != [] and again == "the same"


def many_saves(whole: Whole, tries: int) -> list[Line]:
    """As many saves as that: the first rank's resident memory after the first hundred, and after all."""
    run = whole.another("saves", max_steps=tries, save_steps=1, save_total_limit=2, logging_steps=50)
    process = run.start()
    sizes: dict[int, float] = {}
    while process.poll() is None:
        saved = [int(path.name.split("-")[1]) for path in run.out.glob("checkpoint-*")]
        rank = ranks_of(process).get(0) if saved else None
        if rank is not None and rank.is_running():
            sizes[max(saved)] = rank.memory_info().rss / 1e6
        time.sleep(0.5)
    start = min((n for n in sizes if n >= min(FIRST_SAVES, tries // 2)), default=0)
    if process.returncode or not start:
        return [(f"{tries} saves", f"status {process.returncode}", False)]
    growth = sizes[max(sizes)] - sizes[start]
    outcome = f"{sizes[start]:.0f} MB after {start}, {growth:+.1f} MB after {max(sizes)}"
    return [(f"{tries} saves", outcome, growth < MOST_GROWTH)]


def _of_files(try_it: Callable[[Run, int], list[Line]]) -> Callable[[Whole, int], list[Line]]:
    """A part of faulty_files.py, which needs the run that nothing has hit alone."""
    return lambda whole, tries: try_it(whole.run, tries)


@dataclass(frozen=True)
class Part:
    """Faults of one kind.

    Attributes:
        tries: most of them; 0 for all that there are.
        asked: what has to come of each.
    """

    run: Callable[[Whole, int], list[Line]]
    tries: int
    asked: str


PARTS = {
    "killed": Part(killed, 20, "`last` goes on and ends with the same weights and records"),
    "stopped": Part(stopped, 10, f"a whole checkpoint and status 143 within {END_OF_STEP_SECONDS:g} s"),
    "without_launcher": Part(without_launcher, 3, f"the same as after TERM, within {END_OF_STEP_SECONDS:g} s"),
    "lost": Part(lost, 10, f"the run ends and names the rank within {NAMED_SECONDS:g} s"),
    "hung": Part(hung, 3, f"the rank is named within {HUNG_SECONDS:g} s"),
    "full_disk": Part(full_disk, 5, "status 1, the path, nothing lost, `last` goes on"),
    "damaged": Part(_of_files(damaged), 0, "status 2 and the file; `last` takes the checkpoint before"),
    "foreign": Part(_of_files(foreign), 0, "status 2 and what differs"),
    "flipped": Part(_of_files(flipped), 100, "found, with the file"),
    "code": Part(_of_files(with_code), 0, "status 2 and the file; nothing is run"),
    "many_saves": Part(many_saves, 1000, f"less than {MOST_GROWTH:g} MB more than after {FIRST_SAVES}"),
}


# ---- the program ----------------------------------------------------------------------------------


def keep_part(name: str, about: dict[str, Any], lines: list[Line]) -> None:
    """Puts the lines of a part into the results, which hold those that were tried before, also by another call."""
    path = RESULTS / "faults_cpu.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result[name] = {"about": about, "lines": lines}
    keep("faults_cpu", report(result), result)


def report(result: dict[str, Any]) -> str:
    """The results as a page."""
    parts = [name for name in PARTS if name in result]
    lines = [("part", "asked", "as asked")]
    for name in parts:
        rows = result[name]["lines"]
        lines.append((name, PARTS[name].asked, f"{sum(line[2] for line in rows)} of {len(rows)}"))
    text = [
        "# Faults of runs with ZeRO-3 on two CPU processes",
        "",
        ABOUT,
        "",
        markdown_table(lines),
    ]
    for name in parts:
        rows = [(done, outcome, "yes" if right else "no") for done, outcome, right in result[name]["lines"]]
        table = markdown_table([("what was done", "what came of it", "as asked"), *summed(rows)])
        text += ["", f"## {name}", "", facts(result[name]["about"]), "", table]
    return "\n".join(text)


def summed(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The same, with equal rows as one."""
    return [(f"{row[0]} ({n} times)" if n > 1 else row[0], *row[1:]) for row, n in Counter(rows).items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tries", type=int, help="at most so many tries of each part; then nothing is written")
    parser.add_argument("--launcher", default="deepspeed", choices=LAUNCHERS)
    args = parser.parse_args()
    logging.getLogger("dft").setLevel(logging.ERROR)  # what is passed over is damaged on purpose
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    about = surroundings(PACKAGES)
    whole = run_whole(place, args.launcher)
    counts = {}
    for name in args.parts:
        part = PARTS[name]
        print(f"{name}: {part.asked}", flush=True)
        found = part.run(whole, min(filter(None, (part.tries, args.tries)), default=0) or ALL)
        lines = [(done, outcome.replace(str(place), "RUNS"), is_right) for done, outcome, is_right in found]
        for done, outcome, is_right in lines:
            print(f"  {'' if is_right else 'WRONG: '}{done}: {outcome}", flush=True)
        counts[name] = [sum(line[2] for line in lines), len(lines)]
        if args.tries is None and args.launcher == "deepspeed":
            keep_part(name, about, lines)
    print(json.dumps(counts))
    if any(right < tried for right, tried in counts.values()):
        sys.exit(f"the runs and what they printed are in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
