"""Runs groups of ranks, each rank in a network namespace of its own, in children that share the imports.

    echo '{"data": {"ranks": [{"namespace": "a", "env": {"RANK": "0"}, "command": ["train_dft.py", "--help"]}]}}' |
        python -m tests.launch.hosts_worker OUT

Writes OUT/NAME.json for each group, [{"status", "output", "seconds"}] of its ranks. `namespace` may be null. A group
may have `faults` that happen to it one after the other: {"when": a file that is there then, "text": a pattern in it,
and "run": a command, or "kill": numbers of ranks}. In those groups heartbeats are faster.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dft.parallel import heartbeat
from tests.launch.command_worker import import_package, run_program

FAST_INTERVAL, FAST_SILENT = 0.5, 4.0  # seconds
NAMESPACES = Path("/run/netns")  # where ip keeps them


def enter(namespace: str) -> None:
    """Moves this process into a network namespace; os.setns is there from Python 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(NAMESPACES / namespace, os.O_RDONLY)
    if libc.setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(descriptor)


def start_rank(rank: dict[str, Any], output: Path) -> int:
    """Starts a child for a rank, and returns its process id."""
    pid = os.fork()
    if pid > 0:
        return pid
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 1
    try:
        if rank["namespace"] is not None:
            enter(rank["namespace"])
        os.environ.update(rank["env"])
        status = run_program(rank["command"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def is_due(fault: dict[str, Any]) -> bool:
    """Whether what a fault waits for has come."""
    path = Path(fault["when"])
    return path.exists() and bool(re.search(fault.get("text", ""), path.read_text()))


def strike(fault: dict[str, Any], pids: list[int]) -> None:
    """Lets a fault happen to the ranks of a group."""
    for number in fault.get("kill", []):
        os.kill(pids[number], signal.SIGKILL)
    if "run" in fault:
        subprocess.run(fault["run"], check=True)


def run_group(group: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Runs the ranks of a group at the same time, and returns how each has ended."""
    began = time.monotonic()
    faults = group.get("faults", [])
    if faults:
        heartbeat.INTERVAL_SECONDS, heartbeat.SILENT_SECONDS = FAST_INTERVAL, FAST_SILENT
    paths = [output.with_suffix(f".{number}") for number in range(len(group["ranks"]))]
    pids = [start_rank(rank, path) for rank, path in zip(group["ranks"], paths, strict=True)]
    ended = {}
    while len(ended) < len(pids):
        for pid, path in zip(pids, paths, strict=True):
            found, status = (0, 0) if pid in ended else os.waitpid(pid, os.WNOHANG)
            if found:
                code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - began
                ended[pid] = {"status": code, "seconds": seconds, "output": path.read_text()}
        if faults and is_due(faults[0]):
            strike(faults.pop(0), pids)
        time.sleep(0.05)
    return [ended[pid] for pid in pids]


def main() -> None:
    groups, out = json.load(sys.stdin), Path(sys.argv[1])
    import_package()
    for name, group in groups.items():
        (out / f"{name}.json").write_text(json.dumps(run_group(group, out / name)))


if __name__ == "__main__":
    main()
