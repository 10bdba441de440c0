"""Starting the processes of a run, with or without a GPU, and work that one process does for its node."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from dft.errors import UserError

T = TypeVar("T")
USER_ERROR_STATUS = 2
SECONDS_TO_SAY_IT = 30.0  # that rank 0 may be behind the others

# Preparing data may take hours on one process; the others must not give up
PATIENCE = timedelta(days=7)


def has_accelerator() -> bool:
    """Whether this machine has a GPU, or another accelerator, that torch can use."""
    return torch.accelerator.is_available()


def join_for_deepspeed() -> dict[str, bool]:
    """Joins the process group for DeepSpeed before TrainingArguments does; returns its `accelerator_config`.

    Without an accelerator, TrainingArguments takes the process for plain multi-CPU training and
    DeepSpeed for a run of one process. Joined here under accelerate's DeepSpeed flag, over gloo, both
    see the same ranks. A program started without a launcher becomes a group of one.

    DeepSpeed's reduction for inference is kept from starting: where the launcher tells it, by LOCAL_SIZE, that all
    ranks share a machine, it leaves 64 MiB a rank in /dev/shm, which is memory, until the machine is restarted.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    if has_accelerator():
        return {}
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    local_size = os.environ.pop("LOCAL_SIZE", None)
    PartialState(backend="gloo")
    if local_size is not None:
        os.environ["LOCAL_SIZE"] = local_size
    return {"use_configured_state": True}


def free_port() -> str:
    """A TCP port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def once_per_node(work: Callable[[], T]) -> T:
    """What `work` returns, run on the first process of every node; on all ranks when it is done everywhere.

    The others wait without a time-out and without touching a device. A UserError on any node is
    raised on every rank.
    """
    state = PartialState()
    group = None
    if state.num_processes > 1:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    outcome: tuple[str | None, T | None] = (None, None)  # error, result
    if state.is_local_main_process:
        try:
            outcome = (None, work())
        except UserError as caught:
            outcome = (str(caught), None)
    outcomes = [outcome]
    if group is not None:
        outcomes = [outcome] * state.num_processes
        dist.all_gather_object(outcomes, outcome, group=group)
        dist.destroy_process_group(group)
    for error, _ in outcomes:
        if error is not None:
            raise UserError(error)
    return outcomes[state.process_index - state.local_process_index][1]
