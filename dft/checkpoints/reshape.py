"""Turn a checkpoint of DeepSpeed's ZeRO into one that any number of processes, and any stage of ZeRO, can load.

ZeRO writes a part of the weights and of the optimizer for each process. Here the parts are joined, and each parameter
is written whole, in DeepSpeed's universal format, as its loaders read it. DeepSpeed has a converter of its own
(deepspeed.checkpoint.ds_to_universal); it writes all numbers twice on the way, and what it makes of ZeRO-3 can't be
loaded by the other stages.
"""

import errno
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dft.checkpoints.compare import RESHAPED, read_facts
from dft.checkpoints.integrity import DEEPSPEED_PARTS
from dft.checkpoints.manifest import MANIFESTS, list_files
from dft.checkpoints.resume import check_resumable
from dft.checkpoints.staging import StagedSave, clear_leftovers
from dft.checkpoints.universal import LATEST, LATEST_OF_PARTS, OPTIMIZER_STATE, is_universal, parts_folder
from dft.errors import UserError
from dft.files import make_directory, take_directory
from dft.parallel.agreement import versions
from dft.printable import printable

PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
# of ZeRO-1 and 2, and of ZeRO-3
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
WEIGHTS = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
FLAT = (WEIGHTS, *MOMENTS)  # what the optimizer holds of each parameter, all parameters in a row
# in a checkpoint, but not for the result: the parts, what names them, and scripts of DeepSpeed's that join them
REPLACED = (DEEPSPEED_PARTS, LATEST_OF_PARTS, MANIFESTS, "zero_to_fp32.py", "zero_to_torch.py")
COMMON = ("loss_scaler", "dynamic_loss_scale", "overflow")  # what stages keep in common besides the parameters
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Parts:
    """What the processes of a run have written of their optimizers.

    Attributes:
        states: of each rank.
        model: the states of the model that rank 0 has written.
        flat: of each rank, for each group of parameters: FLAT, each one tensor, and step.
    """

    states: list[dict[str, Any]]
    model: dict[str, Any]
    flat: list[list[dict[str, Any]]]

    @property
    def is_stage_3(self) -> bool:
        """Whether each parameter is divided over all ranks; before stage 3, all of them in a row are."""
        return "fp32_flat_groups" in self.states[0]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Settings of the optimizer for each group of parameters."""
        return _base_optimizer(self.states[0])["param_groups"]


def reshape(checkpoint: Path, output: Path) -> int | None:
    """Writes a checkpoint of any shape beside one of one shape, which stays as it is.

    Returns:
        The rows of a step over all processes, which a run that goes on must keep; None if that isn't known.

    Raises:
        UserError: there is no such checkpoint, it isn't whole, it has nothing to reshape or what can't be; the output
            is there already, or there is no room for it.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: give a new directory, or delete it")
    step = _check(checkpoint)
    parts = read_parts(checkpoint)
    facts, packages = read_facts(checkpoint)
    facts = {name: value for name, value in facts.items() if name not in RESHAPED}
    run_dir = make_directory(str(output.parent), "--output in")
    take_directory(run_dir, "--output in")
    needed = sum(list_files(checkpoint).values())
    save = StagedSave(run_dir, output.name)
    try:
        save.begin(needed)
        _copy_rest(checkpoint, save.staged)
        write_whole(parts, save.staged, f"global_step{step}_universal")
        save.publish({"step": step, "made_with": facts, "versions": packages or versions()})
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"--output {output}: there is no room for it, about {needed / 2**30:.2f} GiB. Make room, or give a "
            "directory on another disk"
        ) from error
    finally:
        save.give_up()
        clear_leftovers(run_dir)
    return facts.get("rows_per_step")


def _check(checkpoint: Path) -> int:
    """The step of a checkpoint that can be reshaped.

    Raises:
        UserError: it can't.
    """
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such directory; give a checkpoint, such as outputs/run/checkpoint-300")
    if is_universal(checkpoint):
        raise UserError(
            f"{checkpoint} is reshaped already: go on from it on any number of processes with "
            f"--resume_from_checkpoint {checkpoint}"
        )
    if not any(checkpoint.glob(DEEPSPEED_PARTS)):
        raise UserError(
            f"{checkpoint} holds no parts that DeepSpeed has written. A checkpoint of DDP or of one process goes on "
            f"as it is, on any number of processes, with --resume_from_checkpoint {checkpoint}; one of FSDP on as "
            "many as have saved it"
        )
    try:
        step, _ = check_resumable(checkpoint)
    except UserError as error:
        raise UserError(str(error).removeprefix("--resume_from_checkpoint ")) from error
    return step


def _unfit(checkpoint: Path, reason: str) -> UserError:
    return UserError(f"{checkpoint} can't be reshaped: {reason}")


def read_parts(checkpoint: Path) -> Parts:
    """Reads the parts of all ranks; their numbers stay on the disk until they are used.

    Raises:
        UserError: some are missing, or they hold what can't be reshaped.
    """
    folder = parts_folder(checkpoint)
    found = {path: match for path in folder.iterdir() if (match := PART.fullmatch(path.name))}
    paths = {int(match[1]): path for path, match in found.items()}
    model = next((_load(path) for name in MODEL_STATES if (path := folder / name).is_file()), {})
    has_joinable = paths and model.get("param_shapes", ()) is not None and len(paths) == len(found)
    if not has_joinable or (folder / "offloaded_tensors").exists():
        raise _unfit(
            checkpoint,
            "only ZeRO-1, 2 and 3, without NVMe and tensor parallelism, keep their optimizer in parts that can be "
            "joined",
        )
    missing = {*range(model["dp_world_size"])} - paths.keys() if "param_shapes" in model else {0}
    if missing:
        raise _unfit(
            checkpoint,
            f"parts of ranks {sorted(missing)} aren't there. Copy those of all nodes into one directory",
        )
    states = [_load(paths[rank])["optimizer_state_dict"] for rank in range(model["dp_world_size"])]
    flat = [_flat_groups(checkpoint, state) for state in states]
    _refuse_what_is_not_trained(checkpoint, model)
    return Parts(states, model, flat)


def _load(path: Path) -> dict[str, Any]:
    """What DeepSpeed has saved. Its pickles have been looked through."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _base_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """The state of the optimizer that a stage of ZeRO holds a part of."""
    return state["optimizer_state_dict" if "fp32_flat_groups" in state else "base_optimizer_state"]


def _flat_groups(checkpoint: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    weights = state.get("fp32_flat_groups", state.get("single_partition_of_fp32_groups"))
    moments = _base_optimizer(state)["state"]
    groups = [{WEIGHTS: numbers, **moments.get(index, {})} for index, numbers in enumerate(weights)]
    for group in groups:
        if group.keys() != {*FLAT, "step"}:
            raise _unfit(
                checkpoint,
                f"its optimizer holds {', '.join(sorted(group))} of a parameter. Only Adam's "
                f"{', '.join((*MOMENTS, 'step'))} can be",
            )
    return groups


def _refuse_what_is_not_trained(checkpoint: Path, model: dict[str, Any]) -> None:
    """Raises UserError where weights are saved that no optimizer has, which DeepSpeed wouldn't load again.

    Those under an adapter aren't saved.
    """
    trained = {name for shapes in model["param_shapes"] for name in shapes}
    others = [name for name in model["module"] if name not in trained | model["shared_params"].keys()]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise _unfit(
            checkpoint,
            f"DeepSpeed's universal checkpoints hold trained weights alone, and {others[0]}{more} isn't trained. Go "
            f"on as it was saved, or begin a new run with --model_name_or_path {checkpoint}",
        )


def whole_parameters(parts: Parts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each parameter's name, and what the optimizer holds of it: FLAT, in the parameter's shape, and step."""
    for index, shapes in enumerate(parts.model["param_shapes"]):
        flat = [groups[index] for groups in parts.flat]
        offset = 0
        for name, shape in shapes.items():
            size = -(-shape.numel() // len(flat))  # of the part of each rank, padded on the last ones
            if parts.is_stage_3:
                places = [(offset, size)] * len(flat)
                offset += size
            else:
                places = [_place_of(state["param_slice_mappings"][index].get(name)) for state in parts.states]
            whole = {key: _joined([group[key] for group in flat], places, shape) for key in FLAT}
            yield name, whole | {"step": flat[0]["step"]}


def _place_of(fragment: Any) -> tuple[int, int]:
    """Where a rank holds a part of a parameter, and how much; a rank may hold nothing of it."""
    return (0, 0) if fragment is None else (fragment.start, fragment.numel)


def _joined(flat: list[Tensor], places: list[tuple[int, int]], shape: torch.Size) -> Tensor:
    pieces = [numbers.narrow(0, start, size) for numbers, (start, size) in zip(flat, places, strict=True)]
    return torch.cat(pieces)[: shape.numel()].view(shape)


def write_whole(parts: Parts, checkpoint: Path, name: str) -> None:
    """Writes the folder `name` of whole parameters, as DeepSpeed's loaders of all stages read it."""
    folder = checkpoint / name
    zero = folder / "zero"
    for parameter, values in whole_parameters(parts):
        if Path(parameter).name != parameter:
            raise _unfit(checkpoint, f"{printable(parameter)} is the name of no parameter")
        (zero / parameter).mkdir(parents=True)
        for key in FLAT:
            torch.save({"param": values[key]}, zero / parameter / f"{key}.pt")
        torch.save(values["step"], zero / parameter / "step.pt")
    common = {key: parts.states[0][key] for key in COMMON if key in parts.states[0]}
    common |= {"ds_version": parts.model["ds_version"], "param_groups": parts.groups}
    of_stage_3 = {"state": {0: {"step": parts.flat[0][0]["step"]}}, "param_groups": parts.groups}
    torch.save(common | {"optimizer_state_dict": of_stage_3}, folder / OPTIMIZER_STATE)
    model = {key: value for key, value in parts.model.items() if key not in ("module", "frozen_param_fragments")}
    for file in MODEL_STATES:
        torch.save(model, folder / file)
    (checkpoint / LATEST).write_text(name, encoding="utf-8")


def _copy_rest(checkpoint: Path, staged: Path) -> None:
    """Copies all that belongs to no single shape: model, tokenizer, random states, schedule, position."""
    for path in checkpoint.iterdir():
        if any(path.match(pattern) for pattern in REPLACED):
            continue
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, staged / path.name)
