"""This process's place among those that a launcher has started, read from the environment; imports no torch."""

import os
from pathlib import Path


def local_rank() -> int:
    """This process's rank among those of its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))


def num_local() -> int | None:
    """How many processes the launcher started on this node; None if none says so."""
    number = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # the latter is DeepSpeed's
    return None if number is None else int(number)


def spans_nodes() -> bool:
    """Whether the launcher started processes on several nodes."""
    on_this_node = num_local()
    return on_this_node is not None and int(os.environ.get("WORLD_SIZE", 1)) > on_this_node


def accelerate_uses(engine: str) -> bool:
    """Whether accelerate's launcher was told to use an engine, DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def tell_script(name: str, number: int) -> None:
    """Writes a number into a file in the directory that scripts/train.sh looks into; without that script, nothing."""
    directory = os.environ.get("DFT_RUN_DIR")
    if directory and Path(directory).is_dir():
        (Path(directory) / name).write_text(f"{number}\n", encoding="utf-8")
