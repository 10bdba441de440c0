"""Where rows come from, for metrics of each source: the data file, or what a row's own field `channel` says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dist_logger import UserError, get_logger

logger = get_logger(__name__)

Channels = Literal["auto", "file", "field", "none"]
MAX_CHANNELS = 50  # that auto gives metrics of their own: a chart for each is still looked at


def file_names(paths: Sequence[str]) -> list[str]:
    """A short name for each file: without endings, with as many directories as it takes to tell them apart."""
    parts = [_parts(path) for path in paths]
    names = []
    for mine in parts:
        others = [theirs for theirs in parts if theirs is not mine]
        count = next((n for n in range(1, len(mine)) if all(t[-n:] != mine[-n:] for t in others)), len(mine))
        names.append("/".join(mine[-count:]))
    return names


def _parts(path: str) -> tuple[str, ...]:
    *directories, name = Path(path).parts
    stem = name.removesuffix(".gz").removesuffix(".zst")
    return (*directories, Path(stem).stem)


def choose_channels(
    wanted: Channels, of_file: np.ndarray, paths: Sequence[str], of_field: np.ndarray, field_names: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """The names of the channels, and the channel of each row.

    Args:
        wanted: file; field, with the file for rows without one; auto: field where there is any, else file, unless
            that makes fewer than 2 or more than MAX_CHANNELS; none.
        of_file, of_field: [R], index into paths and into field_names, of which "" is none.

    Returns:
        names, empty for none; int32 [R], index into them.

    Raises:
        UserError: field is wanted, and no row has one.
    """
    if wanted == "none":
        return [], np.zeros(len(of_file), dtype=np.int32)
    of_path = file_names(paths)
    labels = sorted({*of_path, *field_names})
    has_field = np.array([bool(name) for name in field_names], dtype=bool)[of_field]
    by_file = np.array([labels.index(name) for name in of_path])[of_file]
    ways = {"file": by_file}
    if has_field.any():
        by_field = np.array([labels.index(name) for name in field_names])[of_field]
        ways = {"field": np.where(has_field, by_field, by_file), "file": by_file}
    elif wanted == "field":
        raise UserError("--channels field: no row has a field 'channel' that holds a name; use --channels file")
    for way, labelled in ways.items():
        used, index = np.unique(labelled, return_inverse=True)
        if wanted == way or (wanted == "auto" and 2 <= len(used) <= MAX_CHANNELS):
            return [labels[i] for i in used], index.astype(np.int32)
        if wanted == "auto" and len(used) > MAX_CHANNELS:
            logger.info("No metrics by %s, which would be %d channels: --channels %s adds them", way, len(used), way)
    return [], np.zeros(len(of_file), dtype=np.int32)
