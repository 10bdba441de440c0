"""Process groups: joined for DeepSpeed without a GPU too, and work that one process does for its whole node."""

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
# Preparing data may take one process hours, and the default of 30 minutes would end the others that wait for it.
NODE_WORK_TIMEOUT = timedelta(days=7)


def has_accelerator() -> bool:
    """Whether this machine has a GPU, or another accelerator, that torch can use."""
    return torch.accelerator.is_available()


def join_for_deepspeed() -> dict[str, bool]:
    """Joins the process group for DeepSpeed, before TrainingArguments would join another one.

    Without an accelerator, TrainingArguments takes the process for plain multi-CPU training, and DeepSpeed takes it
    for a run of one process. If it has joined over gloo and under accelerate's DeepSpeed flag, both see the same
    ranks. A program that was started without a launcher becomes a group of one.

    DeepSpeed's shared-memory reduction, meant for inference, is kept from starting. Where the launcher says by
    LOCAL_SIZE that all ranks share a machine, it would leave 64 MiB per rank in /dev/shm, which is memory, until the
    machine is restarted.

    Returns:
        The `accelerator_config` that TrainingArguments needs; empty with an accelerator.
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
    """Finds a TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def once_per_node(work: Callable[[], T]) -> T:
    """Calls `work` on the first process of every node, and returns its result on all processes of the node.

    The others wait until it is done on all nodes, over gloo, so that no device is busy waiting. All ranks must call
    this together.

    Raises:
        UserError: on every rank, if `work` raised one on any node.
    """
    state = PartialState()
    group = None
    if state.num_processes > 1:
        group = dist.new_group(backend="gloo", timeout=NODE_WORK_TIMEOUT)
    outcome: tuple[str | None, T | None] = (None, None)  # (error message, result)
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
