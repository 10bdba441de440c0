"""Numbers that a model gives for each row: computed in shards, which are kept, so that a run that was cut goes on.

The ranks of a launcher share the batches. A shard is written as soon as it is computed; the files are named after the
model and the rows, so that another choice from the same scores computes nothing.

Shapes: R rows, B rows of a batch.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from datasets.config import HF_DATASETS_CACHE
from transformers import PreTrainedModel

from dft.distributed import gather_in_training
from dft.reference.scoring import Batch, plan_scoring
from dft.reference.store import load, save

logger = logging.getLogger(__name__)

CACHE_DIRECTORY = Path(HF_DATASETS_CACHE) / "dft" / "selection"
SHARD_TOKENS = 2**18  # of a shard, with which a run that was cut goes on
SECONDS_BETWEEN_LINES = 10.0
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt")

Compute = Callable[[Batch], np.ndarray]  # rows that are computed at once -> a number or a vector of each, [B, ...]


def compute_rows(lengths: np.ndarray, compute: Compute, tokens_at_once: int, directory: Path) -> np.ndarray:
    """A number or a vector of each row on every rank, [R, ...]. All ranks must call it together.

    Args:
        lengths: tokens of each row, int [R].
        compute: called on one rank for each batch of rows of similar length.
        tokens_at_once: tokens of a batch, with padding; a longer row is a batch of its own.
        directory: gets the shards, see shard_directory.
    """
    shards = _shards(lengths)
    done, started, told = 0, time.monotonic(), time.monotonic()
    computed = 0  # tokens, without those of shards that were there
    parts = []
    for number, members in enumerate(shards):
        name = f"{number:05}_of_{len(shards):05}.npz"
        values = _found(directory, name, len(members))
        tokens = int(lengths[members].sum())
        if values is None:
            batches = [[int(members[i]) for i in batch] for batch in plan_scoring(lengths[members], tokens_at_once)]
            of_row = share_batches(batches, compute)
            values = np.stack([of_row[index] for index in members.tolist()])
            if _rank() == 0:
                save([directory], name, (values, np.ones(len(members), dtype=np.int64)))
            computed += tokens
        parts.append(values)
        done += tokens
        if time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            _tell(done, int(lengths.sum()), computed / (told - started))
    if not parts:
        return np.zeros(0)
    ordered = np.empty((len(lengths), *parts[0].shape[1:]), dtype=parts[0].dtype)
    ordered[np.concatenate(shards)] = np.concatenate(parts)
    return ordered


def _shards(lengths: np.ndarray) -> list[np.ndarray]:
    """The rows of each shard, the longest first, int64."""
    order = np.argsort(-lengths, kind="stable")
    number = (np.cumsum(lengths[order]) - 1) // SHARD_TOKENS
    return [part for part in np.split(order, np.flatnonzero(np.diff(number)) + 1) if len(part)]


def share_batches(batches: list[Batch], compute: Compute) -> dict[int, np.ndarray]:
    """What is computed for each row, on every rank. All ranks must call it together; each computes its share."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    mine = {}
    for batch in batches[_rank() :: world]:
        mine.update(zip(batch, compute(batch), strict=True))
    return {index: value for part in gather_in_training(mine) for index, value in part.items()}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _found(directory: Path, name: str, num_rows: int) -> np.ndarray | None:
    """A shard that was computed before, which the first rank reads for all."""
    found = load([directory], name) if _rank() == 0 else None
    values = gather_in_training(found)[0]
    return None if values is None or len(values[0]) != num_rows else values[0]


def _tell(done: int, total: int, tokens_per_second: float) -> None:
    left = f"{(total - done) / tokens_per_second:,.0f} s left" if tokens_per_second > 0 else "read from shards"
    logger.info("%s of %s tokens, %s", f"{done:,}", f"{total:,}", left)


# ---- where shards are kept ----------------------------------------------------------------------


def model_directories(directory: Path, model: PreTrainedModel) -> list[Path]:
    """Where the files of a model are, and those of its base model where it is an adapter."""
    return list(dict.fromkeys((directory, Path(model.config._name_or_path or directory))))


def shard_directory(
    cache: Path | None, kind: str, models: Sequence[Path], rows: Sequence[np.ndarray], settings: dict[str, Any]
) -> Path:
    """The directory for the shards of these rows by this model.

    Args:
        cache: holds the directories; by default one beside datasets' cache.
        kind: of what is computed.
        models: directories, whose files are told by their names, sizes and times: an adapter's and its base model's.
        rows: arrays that say all that the model sees of each row.
        settings: what decides over the numbers beside the model and the rows, as JSON values.
    """
    files = sorted(file for model in models for pattern in WEIGHT_FILES for file in model.glob(pattern))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = json.dumps(
        [kind, [str(model.resolve()) for model in models], facts, settings, SHARD_TOKENS], sort_keys=True
    )
    digest = hashlib.blake2b(told.encode(errors="backslashreplace"), digest_size=16)
    for row in rows:
        digest.update(f"{len(row)} ".encode() + np.ascontiguousarray(row).tobytes())
    return (cache or CACHE_DIRECTORY) / f"{kind}_{digest.hexdigest()}"
