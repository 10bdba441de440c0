"""Process groups: joined for DeepSpeed without a GPU too, work that one process does for its node, shared failures."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from dft.errors import SharedUserError, UserError
from dft.interface import set_gloo_interface
from dft.launched import local_rank

T = TypeVar("T")
# Preparing data may take one process hours, and the default of 30 minutes would end the others that wait for it.
NODE_WORK_TIMEOUT = timedelta(days=7)
MEETING_TIMEOUT = timedelta(minutes=30)  # between two meetings, ranks do nothing that takes long
FAILURE_TIMEOUT = timedelta(minutes=10)  # a rank that has failed waits this long for the others' next meeting
LISTED_NODES = 3  # longer lists of nodes are cut
_others_listen = True  # whether other ranks will come to a gathering, see stop_listening


def has_accelerator() -> bool:
    """Whether this machine has a GPU, or another accelerator, that torch can use."""
    return torch.accelerator.is_available()


def join_for_deepspeed(timeout: timedelta) -> dict[str, bool]:
    """Joins the process group for DeepSpeed, before TrainingArguments would join another one.

    Without an accelerator, TrainingArguments takes the process for plain multi-CPU training, and DeepSpeed takes it
    for a run of one process. If it has joined over gloo and under accelerate's DeepSpeed flag, both see the same
    ranks. A program that was started without a launcher becomes a group of one.

    DeepSpeed's shared-memory reduction, meant for inference, is kept from starting. Where the launcher says by
    LOCAL_SIZE that all ranks share a machine, it would leave 64 MiB per rank in /dev/shm, which is memory, until the
    machine is restarted.

    Args:
        timeout: of the group's collectives.

    Returns:
        The `accelerator_config` that TrainingArguments needs; empty with an accelerator.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    if has_accelerator():
        return {}
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    local_size = os.environ.pop("LOCAL_SIZE", None)
    PartialState(backend="gloo", timeout=timeout)
    if local_size is not None:
        os.environ["LOCAL_SIZE"] = local_size
    return {"use_configured_state": True}


def join_on_cpu(timeout: timedelta) -> None:
    """Joins the process group of a launcher over gloo, where TrainingArguments would join it without the time-out."""
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)


def free_port() -> str:
    """Finds a TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def once_per_node(work: Callable[[], T]) -> T:
    """Calls `work` on the first process of every node, and returns its result on all processes of the node.

    The others wait until it is done on all nodes, over gloo, so that no device is busy waiting. All ranks must call
    this together. A rank that has failed before (see tell_failure) is heard of before the work begins.

    Raises:
        SharedUserError: on every rank, if `work` raised a UserError on any node, or if a rank has failed before.
    """
    gather_from_all(None)
    state = PartialState()
    error, result = None, None
    with _gloo_group(NODE_WORK_TIMEOUT) as group:
        if state.is_local_main_process:
            try:
                result = work()
            except UserError as caught:
                error = str(caught)
        results, _ = _exchange(group, error, result)
    return results[state.process_index - state.local_process_index]


def gather_from_all(value: T) -> tuple[list[T], list[str]]:
    """Gathers a value from every rank, over gloo. All ranks must call this together.

    Returns:
        The values in the order of the ranks, and for each rank the name of its node.

    Raises:
        SharedUserError: on every rank, if one has failed before it came here, see tell_failure.
    """
    PartialState()  # joins the ranks, if nothing has yet
    with _gloo_group(MEETING_TIMEOUT) as group:
        return _exchange(group, None, value)


def gather_in_training(value: T) -> list[T]:
    """Gathers a value from every rank in the training's own process group. All ranks must call this together.

    None of them goes on before all have come. It may also be called once the training has begun, when a rank that
    fails ends without telling the others, who notice it in this group.
    """
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def stop_listening() -> None:
    """Says that the last gathering is over: a rank that fails from now on ends at once, and with it its connections.

    These are what the others then notice, in the collectives of the training.
    """
    global _others_listen
    _others_listen = False


def others_listen() -> bool:
    """Whether the other ranks are still to come to a gathering, where they would hear of a failure of this one."""
    return _others_listen


def tell_failure(message: str) -> str:
    """Tells the ranks of all nodes that this one fails, in place of the gathering that it would have come to next.

    Without this, the other nodes would wait for it in that gathering.

    Returns:
        On which nodes the run fails and on which it doesn't; empty if they all fail alike, or if nobody listens.
    """
    if not others_listen():
        return ""
    try:
        if not dist.is_initialized():
            set_gloo_interface()
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=FAILURE_TIMEOUT)
        with _gloo_group(FAILURE_TIMEOUT) as group:
            _exchange(group, message, None)
    except SharedUserError as error:
        return str(error).replace(message, "the error above") if str(error) != message else ""
    except RuntimeError:  # the others have ended, or didn't come in time
        pass
    return ""


@contextmanager
def _gloo_group(timeout: timedelta) -> Iterator[dist.ProcessGroup | None]:
    """A group of all ranks, which waits on the processor; None for one process, which needs no network."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield None
        return
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
        yield group
    except UserError:
        raise  # which all ranks have heard of, in this group
    except BaseException:
        stop_listening()  # the others notice the end of this process in the group, or are those that have ended
        raise
    # not after an exception: a group that has lost a peer would wait for it
    dist.destroy_process_group(group)


def _exchange(group: dist.ProcessGroup | None, error: str | None, result: T) -> tuple[list[T], list[str]]:
    """Gathers the results of all ranks, with the name of each rank's node; raises SharedUserError for their errors."""
    mine = (socket.gethostname(), local_rank(), error, result)
    gathered = [mine]
    if group is not None:
        gathered = [mine] * dist.get_world_size(group)
        dist.all_gather_object(gathered, mine, group=group)
    hosts, local_ranks, errors, results = zip(*gathered, strict=True)
    nodes = node_names(hosts, local_ranks)
    if any(text is not None for text in errors):
        raise SharedUserError(describe_failures(nodes, errors))
    return list(results), nodes


def node_names(hosts: Sequence[str], local_ranks: Sequence[int]) -> list[str]:
    """The name of each rank's node, as "node 1 (worker-1)". The ranks of a node follow each other."""
    node, names = -1, []
    for host, rank_on_node in zip(hosts, local_ranks, strict=True):
        node += rank_on_node == 0
        names.append(f"node {node} ({host})")
    return names


def listed(names: Sequence[str]) -> str:
    """Names without repetitions, as "node 0 (a), node 1 (b) and 60 more"."""
    names = list(dict.fromkeys(names))
    more = len(names) - LISTED_NODES
    return ", ".join(names[:LISTED_NODES]) + (f" and {more} more" if more > 0 else "")


def describe_failures(nodes: Sequence[str], errors: Sequence[str | None]) -> str:
    """One message for the errors of all ranks: with the nodes that have them, unless all nodes have the same.

    Args:
        nodes, errors: of each rank; None for a rank without an error.
    """
    failed: dict[str, list[str]] = {}
    for node, error in zip(nodes, errors, strict=True):
        if error is not None:
            failed.setdefault(error, []).append(node)
    first = next(iter(failed))
    sound = [node for node in nodes if not any(node in names for names in failed.values())]
    if len(set(nodes)) == 1 or (len(failed) == 1 and not sound):
        return first
    lines = [f"{listed(names)}: {error}" for error, names in failed.items()]
    if sound:
        lines.append(
            f"{listed(sound)}: no such error. Every node needs the same files: share the data, the model and "
            "--output_dir between them, or copy what is missing."
        )
    return "\n".join(lines)
