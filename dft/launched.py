"""This process's place among those that a launcher has started, read from the environment; imports no torch."""

import os


def local_rank() -> int:
    """This process's rank among those of its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))


def spans_nodes() -> bool:
    """Whether the launcher started processes on several nodes."""
    on_this_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # the latter is DeepSpeed's
    return on_this_node is not None and int(os.environ.get("WORLD_SIZE", 1)) > int(on_this_node)
