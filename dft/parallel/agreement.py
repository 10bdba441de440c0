"""Whether all nodes are about to do the same training: compared before it begins, refused with a table if not.

Ranks that differ in flags, software or data may train without an error, on gradients of different things; or one may
wait for ever in a collective that the others never come to. So what decides the training is gathered from all ranks.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dft.data.prepared import PreparedData
from dft.digest import digest_of_rows
from dft.distributed import gather_from_all, listed, once_per_node, stop_listening
from dft.errors import SharedUserError

logger = logging.getLogger(__name__)

Facts = dict[str, dict[str, Any]]  # {kind, a key of REMEDIES: {name: value}}
REMEDIES = {
    "flags": "start every node with the same flags and the same configuration files",
    "versions": "install the same versions on every node, those of constraints.txt",
    "code": "check out the same commit of this project on every node, without changes",
    "device": "use the same kind of GPU on every node",
    "data": "give every node the same data files and chat template; paths may differ, contents may not",
    "checkpoint": "share --output_dir between the nodes, or copy the checkpoint to every node",
}
# Settings that a node may have for itself: paths, whose contents are compared where they matter; what only one rank
# uses; and how fast rows are read.
OF_A_NODE = {
    *("model_name_or_path", "data_files", "eval_data_files", "chat_template", "data_cache_dir", "reference_cache_dir"),
    *("adapter", "stages"),
    *("output_dir", "logging_dir", "resume_from_checkpoint", "deepspeed", "local_rank"),
    *(
        "shared_files",
        "overwrite_cache",
        "preprocessing_num_workers",
        "debug_data_processing",
        "reduce_logging",
        "peak_tflops",
    ),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "debug", "report_to", "run_name"),
    *("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token"),
    *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "skip_memory_metrics"),
}
EXACT = ("torch", "transformers", "deepspeed")  # packages whose patch versions may change numbers
TOP_LEVEL_CODE = ("train_dft.py", "dft_trainer.py", "data_utils.py", "dist_logger.py")


def agree_on_settings(groups: Iterable[Any], args: TrainingArguments) -> None:
    """Compares flags, software and devices of all ranks, before data is prepared. All ranks must call this together.

    Args:
        groups: the dataclasses of settings, `args` among them.

    Raises:
        SharedUserError: on every rank, if they differ.
    """
    gathered, nodes = gather_from_all(start_facts(groups, args))
    refuse_differences(gathered, nodes)
    if len(set(nodes)) > 1:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "that of the host's name")
        logger.info("Nodes: %s, which agree; gloo's interface on this one: %s", listed(nodes), interface)


def agree_on_data(made_with: Mapping[str, Any], prepared: PreparedData, step: int, attention: str) -> None:
    """Compares prepared data and the checkpoint, before the model is loaded. All ranks must call this together.

    It is the last gathering before the training.

    Args:
        made_with: see dft.checkpoints.facts.run_facts.
        prepared: the rows.
        step: that the training goes on from.
        attention: the attention implementation.

    Raises:
        SharedUserError: on every rank, if they differ.
    """

    def find_facts() -> Facts:
        """What a node has prepared, and goes on from."""
        evaluation = prepared.evaluation
        data = {"rows_of_files": [entry["kept"] for entry in prepared.report["files"]], "channels": prepared.channels}
        data |= {name: made_with.get(name) for name in ("training_rows", "content_of_rows")}
        if evaluation is not None:
            data |= {"evaluation_rows": len(evaluation), "content_of_evaluation": digest_of_rows(evaluation)}
        rest = {name: value for name, value in made_with.items() if name not in data}
        return {"data": data, "checkpoint": {"step": step}, "flags": rest | {"attention": attention}}

    gathered, nodes = gather_from_all(once_per_node(find_facts))
    refuse_differences(gathered, nodes)
    stop_listening()


# ---- facts --------------------------------------------------------------------------------------


def start_facts(groups: Iterable[Any], args: TrainingArguments) -> Facts:
    """What a rank is started with: its flags, without those of OF_A_NODE; versions; digest of the code; device."""
    flags = {field.name: vars(group)[field.name] for group in groups for field in fields(group)}
    plugin = args.deepspeed_plugin
    flags["deepspeed_config"] = None if plugin is None else plugin.hf_ds_config.config
    is_cuda = args.device.type == "cuda"
    return {
        "flags": {name: value for name, value in _flattened(flags).items() if name.split(".")[0] not in OF_A_NODE},
        "versions": versions(),
        "code": {"digest_of_code": digest_of_code()},
        "device": {"device": torch.cuda.get_device_name(args.device) if is_cuda else args.device.type},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that compute; of accelerate and Python without their last part."""
    found = {"python": platform.python_version().rpartition(".")[0]}
    for name in (*EXACT, "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["accelerate"] = found["accelerate"].rpartition(".")[0]
    return found


def digest_of_code() -> str:
    """A hash of this project's Python files, which tells changes that are not committed too, 16 hexadecimal digits."""
    package = Path(__file__).parents[1]
    paths = sorted(package.rglob("*.py")) + [package.parent / name for name in TOP_LEVEL_CODE]
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        if path.exists():
            digest.update(path.relative_to(package.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{path of keys: value as text}, so that a difference inside a configuration is named by its key."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, default=str)
    return flat


# ---- comparison ---------------------------------------------------------------------------------


def refuse_differences(gathered: Sequence[Facts], nodes: Sequence[str]) -> None:
    """Compares the facts of all ranks.

    Args:
        gathered, nodes: the facts of each rank, and the name of its node.

    Raises:
        SharedUserError: they differ; its message says what, where, and what to do.
    """
    lines, kinds = [], []
    for kind, remedy in REMEDIES.items():
        of_kind = [facts.get(kind, {}) for facts in gathered]
        for name in dict.fromkeys(name for facts in of_kind for name in facts):
            values = [str(facts.get(name, "not set")) for facts in of_kind]
            if len(set(values)) > 1:
                lines.append(f"  {name}: {_by_value(values, nodes)}")
                kinds.append(f"{kind}: {remedy}")
    if lines:
        remedies = "\n".join(dict.fromkeys(kinds))
        raise SharedUserError(
            "the nodes don't agree, and would not train the same model. Nothing was trained.\n"
            + "\n".join(lines)
            + f"\n{remedies}"
        )


def _by_value(values: Sequence[str], nodes: Sequence[str]) -> str:
    """Each value and where it is, as "2e-06 on node 0 (a); 1e-05 on node 1 (b)"; its ranks where a node differs."""
    of_node: dict[str, set[str]] = {}
    for value, node in zip(values, nodes, strict=True):
        of_node.setdefault(node, set()).add(value)
    places: dict[str, list[str]] = {}
    for rank, (value, node) in enumerate(zip(values, nodes, strict=True)):
        places.setdefault(value, []).append(node if len(of_node[node]) == 1 else f"rank {rank} of {node}")
    return "; ".join(f"{value} on {listed(names)}" for value, names in places.items())
