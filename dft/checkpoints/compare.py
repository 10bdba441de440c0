"""A checkpoint and the run that goes on from it are compared: what differs is listed, and refused if it matters.

A run that goes on with other rows, batches, another loss or learning rate is another run, whose position in the epoch
and in the schedule mean nothing.
"""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dft.checkpoints.facts import engine_facts
from dft.checkpoints.integrity import DEEPSPEED_PARTS
from dft.checkpoints.manifest import read_manifests
from dft.checkpoints.universal import is_universal
from dft.errors import UserError
from dft.parallel.agreement import versions

logger = logging.getLogger(__name__)

OLDER_FACTS_FILE = "made_with.json"  # in checkpoints without a manifest
# What may differ: the random states are the checkpoint's, how far to train is for the run that goes on to say, and the
# rows of a step are the same however they are divided over processes.
LENGTH = ("max_steps", "num_train_epochs")
ACCEPTED = ("seed", "world_size", *LENGTH)
SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
OPTIMIZER = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
RESHAPED = {"world_size", "zero_stage"}  # what scripts/reshape_checkpoint.py makes free
SHARDS = ("deepspeed", "fsdp")  # engines that are given no checkpoint of another number of processes


def read_facts(checkpoint: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a checkpoint was made with (see facts.run_facts), and the versions of packages; {} where it doesn't say.

    Raises:
        UserError: what says it can't be read.
    """
    try:
        manifests = list(read_manifests(checkpoint).values())
        if manifests:
            return manifests[0]["made_with"] or {}, manifests[0]["versions"]
        path = checkpoint / OLDER_FACTS_FILE
        return (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}), {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: what it was made with can't be read ({error})"
        ) from error


def check_loadable(checkpoint: Path, args: TrainingArguments) -> None:
    """Checks that this run has the engine and the processes that a checkpoint in parts can be loaded with.

    Raises:
        UserError: it hasn't, and would stop in the middle of loading or go on with an optimizer that is new.
    """
    then, _ = read_facts(checkpoint)
    has_parts = any(checkpoint.glob(DEEPSPEED_PARTS))
    then = {"engine": "deepspeed" if has_parts else "torch"} | then
    now = engine_facts(args)
    decisive = ["engine", "zero_stage", "fsdp"] + (["world_size"] if then["engine"] in SHARDS else [])
    different = [name for name in decisive if name in then and then[name] != now[name]]
    if is_universal(checkpoint) and now["zero_stage"] == 0:  # which has no parts to fill with it
        then, different = then | {"zero_stage": "1, 2 or 3"}, [*different, "zero_stage"]
    if different:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} can't be loaded by this run:{_listed(different, then, now)}\n"
            "A checkpoint is loaded by what has saved it, and one in parts on as many processes: start this run so, "
            f"or {_way_out(checkpoint, different, then, now)}"
        )


def _way_out(checkpoint: Path, different: list[str], then: dict[str, Any], now: dict[str, Any]) -> str:
    has_parts = then["engine"] == "deepspeed" and 0 not in (then.get("zero_stage"), now["zero_stage"])
    if has_parts and {*different} <= RESHAPED:
        return (
            "make a checkpoint that any number of processes and any stage can load:\n"
            f"    python scripts/reshape_checkpoint.py {shlex.quote(str(checkpoint))}"
        )
    return f"begin a new one with --model_name_or_path {checkpoint}"


def compare_facts(checkpoint: str | Path, now: dict[str, Any], *, go_on: bool) -> None:
    """Compares what a checkpoint was made with and what the run that goes on from it is made with.

    Args:
        now: see facts.run_facts; only what both know of is compared.
        go_on: differences that change the result are a warning.

    Raises:
        UserError: there are such differences; or the file that tells can't be read.
    """
    then, versions_then = read_facts(Path(checkpoint))
    if not then:
        logger.info("%s doesn't say what it was made with, so the data and settings aren't compared", checkpoint)
        return
    different = [name for name in now if name in then and then[name] != now[name]]
    decisive = [name for name in different if name not in ACCEPTED]
    then, now = then | versions_then, now | versions()
    accepted = [name for name in different if name in ACCEPTED]
    accepted += [name for name in versions_then if name in now and versions_then[name] != now[name]]
    if accepted:
        more = "; the learning rate is that of the new length" if {*different} & {*LENGTH} else ""
        logger.warning(
            "This run differs from %s in what is accepted%s:%s", checkpoint, more, _listed(accepted, then, now)
        )
    if not decisive:
        return
    what = f"{checkpoint} was made with other data or settings than this run:{_listed(decisive, then, now)}"
    if not go_on:
        raise UserError(
            f"--resume_from_checkpoint {what}\nGive what the checkpoint was made with; or begin a new run with "
            f"--model_name_or_path {checkpoint}; or go on all the same with --resume_anyway True{_follows(decisive)}"
        )
    logger.warning(
        "%s\nIt goes on all the same, and is not the run that it would have been%s", what, _follows(decisive)
    )


def _follows(different: list[str]) -> str:
    """What the run goes on with, where the checkpoint holds another value."""
    parts = []
    if {*different} & {*SCHEDULE}:
        parts.append("the learning rate and its schedule follow the flags of this run")
    if {*different} & {*OPTIMIZER}:
        parts.append("the optimizer keeps the settings of the checkpoint")
    return f"; {', '.join(parts)}" if parts else ""


def _listed(names: list[str], then: dict[str, Any], now: dict[str, Any]) -> str:
    return "".join(f"\n  {name}: checkpoint {then.get(name)}, now {now.get(name)}" for name in names)
