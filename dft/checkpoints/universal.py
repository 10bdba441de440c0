"""Load a checkpoint that scripts/reshape_checkpoint.py has made: on any number of processes, by any stage of ZeRO."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim import Optimizer

LATEST = "latest_universal"  # DeepSpeed finds the folder of such a checkpoint by it,
LATEST_OF_PARTS = "latest"  # and that of others by this one
OPTIMIZER_STATE = "zero/optimizer_state.pt"  # in that folder: what all parameters have in common


def is_universal(checkpoint: str | Path | None) -> bool:
    """Whether a checkpoint holds whole parameters, and not a part of them for each process."""
    return checkpoint is not None and (Path(checkpoint) / LATEST).is_file()


def latest_file(checkpoint: Path) -> Path:
    """The file in a checkpoint of DeepSpeed's that names the folder of its parts, or of whole parameters."""
    return checkpoint / (LATEST if is_universal(checkpoint) else LATEST_OF_PARTS)


def parts_folder(checkpoint: Path) -> Path:
    """The folder that this file names; it may not be there."""
    return checkpoint / latest_file(checkpoint).read_text(encoding="utf-8", errors="replace").strip()


@contextmanager
def loaded_as_saved(checkpoint: str | Path | None) -> Iterator[None]:
    """Has DeepSpeed load a checkpoint in the format that it is in.

    DeepSpeed's configuration says it for a whole run, in which a resumed checkpoint may have the one format and the
    best checkpoint the other.
    """
    if not is_universal(checkpoint):
        yield
        return
    from deepspeed import DeepSpeedEngine  # not at the top: importing it takes seconds, and most runs don't need it

    given = DeepSpeedEngine.load_universal_checkpoint
    DeepSpeedEngine.load_universal_checkpoint = lambda engine: True
    try:
        yield
    finally:
        DeepSpeedEngine.load_universal_checkpoint = given


def complete_optimizer(optimizer: Optimizer, checkpoint: Path) -> None:
    """Mends what DeepSpeed leaves wrong when it has loaded whole parameters into an optimizer.

    Under ZeRO-3 it gives all groups of parameters the settings of the first, so that weight decay would reach the
    norms, and one count of steps to all, which each of them then advances. The count is on the processor wherever the
    optimizer needs it.
    """
    saved = torch.load(parts_folder(checkpoint) / OPTIMIZER_STATE, map_location="cpu", weights_only=False)
    for group, earlier in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in earlier.items() if name != "params"})
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(parameter.device if on_device else "cpu")
