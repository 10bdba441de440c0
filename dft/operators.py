"""DeepSpeed's operators: built before a run starts its processes, so that none waits for another's build.

    python -m dft.operators ds_config/zero3_offload.json    # what this configuration needs
    DS_ACCELERATOR=cpu python -m dft.operators              # what every run without a GPU needs

A build that was killed leaves a file `lock` in the operator's directory, for which the next one would wait for ever.
Those that no process holds are removed.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

LONGEST_BUILD = 600.0  # seconds; an older lock is nobody's, on whatever machine
NETWORK = ("nfs", "lustre", "gpfs", "ceph", "cifs", "smb", "beegfs", "fuse", "9p")  # types of file systems
BUILDERS = {"deepspeed_shm_comm": "ShareMemCommBuilder", "cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}


def needed_operators(config: dict[str, Any], is_cpu: bool) -> list[str]:
    """The operators that a run with this configuration of DeepSpeed builds.

    Args:
        is_cpu: whether there is no GPU, so that processes talk over shared memory.
    """
    needed = ["deepspeed_shm_comm"] if is_cpu else []
    zero = config.get("zero_optimization", {})
    places = ("offload_optimizer", "offload_param")
    devices = {place: (zero.get(place) or {}).get("device", "none") for place in places}
    if devices["offload_optimizer"] in ("cpu", "nvme") and config.get("zero_force_ds_cpu_optimizer", True):
        needed.append("cpu_adam")
    if "nvme" in devices.values():
        needed.append("async_io")
    return needed


def read_config(path: Path | None) -> dict[str, Any]:
    """A configuration of DeepSpeed; an empty one if it can't be read, which the program will say."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def remove_stale_locks(directory: Path) -> list[Path]:
    """Removes the locks of builds that have ended, and returns them.

    A lock that no process of this machine has open is stale. Where that can't be known, on a network and of another
    user's locks, its age decides.
    """
    held = _open_files()
    is_shared = _file_system(directory).startswith(NETWORK)
    stale = []
    for lock in sorted(directory.glob("*/lock")):
        about = lock.stat()
        is_known = not is_shared and about.st_uid == os.getuid()
        is_old = time.time() - about.st_mtime > LONGEST_BUILD
        if str(lock.resolve()) not in held and (is_known or is_old):
            lock.unlink(missing_ok=True)
            stale.append(lock)
    return stale


def _open_files() -> set[str]:
    """The files that processes of this machine have open, as far as this user may see."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(os.readlink(descriptor))
        except OSError:
            continue  # the process has ended, or is another user's
    return found


def _file_system(directory: Path) -> str:
    """The type of the file system that a directory is on, as Linux calls it; "" if it isn't known."""
    places = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    path = directory.resolve()
    holding = [(place, kind) for place, kind in places if path.is_relative_to(place)]
    return max(holding, key=lambda pair: len(pair[0]), default=("", ""))[1]


def build(name: str) -> None:
    """Builds an operator for the processor or the GPU that is there."""
    import deepspeed.ops.op_builder as builders  # imports torch
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(BUILDERS[name]) or getattr(builders, BUILDERS[name])()
    builder.load(verbose=False)


def main() -> None:
    """The command line of this module: removes stale locks, and builds what is missing in TORCH_EXTENSIONS_DIR."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="a configuration of DeepSpeed")
    args = parser.parse_args()
    directory = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for lock in remove_stale_locks(directory):
        print(f"Removed {lock}, which a build that was killed had left behind")
    is_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    for name in needed_operators(read_config(args.config), is_cpu):
        if not list((directory / name).glob("*.so")):
            print(f"Building DeepSpeed's operator {name} (a minute or two, once)", flush=True)
            build(name)


if __name__ == "__main__":
    main()
