"""Channels: the sources of rows that have metrics of their own, by data file or by the rows' field `channel`."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dft.config.data import MAX_CHANNELS, Channels
from dft.data.names import numbered, shortest_endings
from dft.errors import UserError

logger = logging.getLogger(__name__)


def file_names(paths: Sequence[str]) -> list[str]:
    """A short name for each file: without its ending, with as many directories as it takes to tell files apart."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    stems = [(*path.parts[1:-1], _stem(path.name)) for path in whole]
    twice = {parts for parts, count in Counter(stems).items() if count > 1}  # which differ in their endings
    stems = [(*s[:-1], path.name) if s in twice else s for s, path in zip(stems, whole, strict=True)]
    return numbered(["".join(c if c.isprintable() else "_" for c in name) for name in shortest_endings(stems)])


def _stem(name: str) -> str:
    return Path(name.removesuffix(".gz").removesuffix(".zst")).stem


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
    number = {label: i for i, label in enumerate(labels)}
    has_field = np.array([bool(name) for name in field_names], dtype=bool)[of_field]
    by_file = np.array([number[name] for name in of_path])[of_file]
    ways = {"file": by_file}
    if has_field.any():
        by_field = np.array([number[name] for name in field_names])[of_field]
        ways = {"field": np.where(has_field, by_field, by_file), "file": by_file}
    elif wanted == "field":
        raise UserError("--channels field: no row has a field 'channel' that holds a name; use --channels file")
    for way, labeled in ways.items():
        used, index = np.unique(labeled, return_inverse=True)
        if wanted == way or (wanted == "auto" and 2 <= len(used) <= MAX_CHANNELS):
            return [labels[i] for i in used], index.astype(np.int32)
        if wanted == "auto" and len(used) > MAX_CHANNELS:
            logger.info("No metrics by %s, which would be %d channels: --channels %s adds them", way, len(used), way)
    return [], np.zeros(len(of_file), dtype=np.int32)
