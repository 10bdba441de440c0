"""Runs groups of ranks, each rank in a network namespace of its own, in children that share the imports.

    echo '{"data": [{"namespace": "a", "env": {"RANK": "0"}, "command": ["train_dft.py", "--help"]}]}' |
        python -m tests.launch.hosts_worker OUT

Writes OUT/NAME.json for each group, [{"status", "output", "seconds"}] of its ranks. `namespace` may be null.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.launch.command_worker import import_package, run_program

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


def run_group(ranks: list[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Runs the ranks of a group at the same time, and returns how each has ended."""
    began = time.monotonic()
    paths = [output.with_suffix(f".{number}") for number in range(len(ranks))]
    running = {start_rank(rank, path): path for rank, path in zip(ranks, paths, strict=True)}
    ended = {}
    while len(ended) < len(ranks):
        pid, status = os.wait()
        seconds = time.monotonic() - began
        ended[running[pid]] = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds}
    return [ended[path] | {"output": path.read_text()} for path in paths]


def main() -> None:
    groups, out = json.load(sys.stdin), Path(sys.argv[1])
    import_package()
    for name, ranks in groups.items():
        (out / f"{name}.json").write_text(json.dumps(run_group(ranks, out / name)))


if __name__ == "__main__":
    main()
