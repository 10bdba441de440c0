"""What the benchmarks share: a quiet machine, versions, tables, and where results are kept."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MARK = "result: "  # of a process, among what libraries print on the same line
MAX_OTHERS = 0.05  # share of the machine that other programs may use while something is measured


# ---- a quiet machine ----------------------------------------------------------------------------


def busy_seconds() -> float:
    """Processor seconds that all programs on this machine have used, and that its host took away."""
    names = "user nice system idle iowait irq softirq steal".split()
    ticks = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    used = dict(zip(names, map(int, ticks), strict=True))
    return sum(used[name] for name in names if name not in ("idle", "iowait")) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(patience: float) -> None:
    """Returns when other programs leave the machine alone, or after `patience` seconds."""
    give_up = time.monotonic() + patience
    while True:
        before, start = busy_seconds(), time.monotonic()
        time.sleep(0.5)
        share = (busy_seconds() - before) / (time.monotonic() - start) / (os.cpu_count() or 1)
        if share < MAX_OTHERS or time.monotonic() > give_up:
            return


def output_of(command: list[str], env: dict[str, str] | None = None) -> str:
    """What a command prints, run in the project's directory; one that fails ends this program with its errors."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def tell(result: Any) -> None:
    """Prints what a process of `results_of` has found."""
    print(MARK + json.dumps(result), flush=True)


def results_of(processes: int, worker: list[str], **env: str) -> list[Any]:
    """What a worker has told on each of so many CPU processes, which torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    output = output_of([*command, *worker], os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env)
    return [json.loads(text) for text in re.findall(rf"{MARK}(\[.*?\])", output)]


def run_measured(command: list[str], patience: float, tries: int) -> dict[str, Any]:
    """The JSON that a command prints last, and `others`: the share of the machine that went to other programs.

    A measurement that others disturbed is made again; the least disturbed one counts.
    """
    best: dict[str, Any] = {}
    for _ in range(tries):
        wait_until_quiet(patience)
        before, start, own = busy_seconds(), time.monotonic(), sum(os.times()[2:4])
        output = output_of(command)
        own = sum(os.times()[2:4]) - own
        seconds = time.monotonic() - start
        others = max(0.0, busy_seconds() - before - own) / seconds / (os.cpu_count() or 1)
        result = json.loads(output.splitlines()[-1]) | {"others": others}
        if not best or others < best["others"]:
            best = result
        if others < MAX_OTHERS:
            break
    return best


# ---- what it ran on -----------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """The version of a package; None if it isn't there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def surroundings(packages: Iterable[str]) -> dict[str, Any]:
    """Commit, versions and hardware."""
    return {
        "command": " ".join(["python", os.path.relpath(os.path.abspath(sys.argv[0]), ROOT), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def commit() -> str:
    """The commit that was measured, and whether files differ from it."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        return name + (" with changes" if _git("status", "--porcelain", "--", "*.py", ":!benchmarks") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def cpu_name() -> str:
    """What the kernel calls the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


# ---- results ------------------------------------------------------------------------------------


def markdown_table(lines: list[tuple[str, ...]]) -> str:
    """A header and lines as a Markdown table, the first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = tuple("-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    aligned = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


def facts(about: dict[str, Any]) -> str:
    """What `surroundings` found, as a Markdown list."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in about["versions"].items())
    return "\n".join(
        [
            f"- command: `{about['command']}`, {about['date']}",
            f"- commit: {about['commit']}",
            f"- {about['cores']} cores of {about['cpu']}, {about['memory_gib']} GiB of memory, {about['system']}",
            f"- Python {about['python']}, {versions}",
        ]
    )


def keep(name: str, text: str, result: dict[str, Any]) -> None:
    """Writes results/NAME.md and results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
