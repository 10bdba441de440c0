"""The rows that the sources of each stage stand for, and the table of the stages."""

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from dft.config.data import MixBy
from dft.config.options import did_you_mean
from dft.config.stages import EVERYTHING, Stage
from dft.data.channels import file_names
from dft.data.prepared import PreparedData
from dft.data.selection import weights_of_ratios
from dft.errors import UserError
from dft.printable import printable

SHOWN_NAMES = 20  # of sources, in a message


def rows_of_stages(
    stages: Sequence[Stage], data: PreparedData, mix_by: MixBy
) -> list[dict[str, tuple[np.ndarray, float]]]:
    """For each stage, {source: its training rows, int64, and how often a pass draws each of them}.

    A source is the short name of a file, as the metrics have it; what a row's field `channel` says; or the path of a
    file or of a directory. Each may be a pattern, with * and ?.

    Args:
        mix_by: what shares are of.

    Raises:
        UserError: a source has no row, or no row that is short enough for the stage; or two of a stage share rows.
    """
    masks = {source: _rows_of(source, data) for source in dict.fromkeys(s for stage in stages for s in stage.sources)}
    for stage in stages:
        for source in stage.sources:
            if not masks[source].any():
                raise UserError(f"{stage.place}: {_no_such_source(source, data)}")
    return [_rows_of_stage(stage, masks, data.lengths, mix_by) for stage in stages]


def _rows_of_stage(
    stage: Stage, masks: dict[str, np.ndarray], lengths: np.ndarray, mix_by: MixBy
) -> dict[str, tuple[np.ndarray, float]]:
    fits = np.ones(len(lengths), dtype=bool) if stage.max_length is None else lengths <= stage.max_length
    taken = np.zeros(len(lengths), dtype=bool)
    rows: dict[str, np.ndarray] = {}
    for source in stage.sources:
        if (taken & masks[source]).any():
            raise UserError(
                f"{stage.place}: stage {stage.name!r} has rows in two sources, one of them {printable(source)}; name "
                "each row once"
            )
        taken |= masks[source]
        rows[source] = np.flatnonzero(masks[source] & fits)
        if not len(rows[source]):
            shortest = lengths[masks[source]].min()
            raise UserError(
                f"{stage.place}: stage {stage.name!r}: max_length {stage.max_length} leaves no row of the source "
                f"{printable(source)}, whose shortest has {shortest} tokens; raise it"
            )
    weights = list(stage.sources.values())
    if stage.has_shares:
        amounts = [len(of) if mix_by == "rows" else int(lengths[of].sum()) for of in rows.values()]
        weights = weights_of_ratios(weights, amounts)
    return {source: (of, weight) for (source, of), weight in zip(rows.items(), weights, strict=True)}


def _rows_of(source: str, data: PreparedData) -> np.ndarray:
    """The training rows of a source, bool [rows of train]."""
    if source == EVERYTHING:
        return np.ones(len(data.train_files), dtype=bool)
    paths = [entry["path"] for entry in data.report["files"]]
    names = zip(file_names(paths), paths, strict=True)
    of_file = [_matches(source, name) or _is_path_of(source, path) for name, path in names]
    of_field = [bool(name) and _matches(source, name) for name in data.field_names]
    return np.array(of_file)[data.train_files] | np.array(of_field, dtype=bool)[data.train_fields]


def _is_path_of(source: str, path: str) -> bool:
    """Whether a source, as a path or as a pattern of one, is a file or a directory above it."""
    if not source:
        return False
    below, whole = Path(os.path.abspath(os.path.expanduser(source))), Path(os.path.abspath(path))
    return whole == below or below in whole.parents or fnmatchcase(str(whole), _whole_pattern(source))


def _whole_pattern(source: str) -> str:
    """A pattern of absolute paths: what stands in front of a relative one is a name, whatever its characters."""
    first, separator, rest = source.partition(os.sep)
    home = os.path.expanduser(first)
    if home != first:
        return os.path.normpath(glob.escape(home) + separator + rest)
    return os.path.normpath(os.path.join(glob.escape(os.getcwd()), source))


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _no_such_source(source: str, data: PreparedData) -> str:
    used = {data.field_names[i] for i in np.unique(data.train_fields)} - {""}
    of_file = file_names([entry["path"] for entry in data.report["files"]])
    names = sorted({of_file[i] for i in np.unique(data.train_files)} | used)
    listed = ", ".join(map(printable, names[:SHOWN_NAMES])) + (", …" if len(names) > SHOWN_NAMES else "")
    return (
        f"no training row is of the source {printable(source)}{did_you_mean(source, names)}; sources are files and "
        f"the rows' fields 'channel': {listed}"
    )


def describe_stages(
    stages: Sequence[Stage],
    sources: Sequence[dict[str, tuple[np.ndarray, float]]],
    drawn: Sequence[tuple[int, np.ndarray]],
    lengths: np.ndarray,
) -> list[dict[str, Any]]:
    """The stages for the data report: steps, rows and tokens of each, and how often its sources are seen.

    Args:
        sources: see rows_of_stages.
        drawn: of each stage, its number of steps, and the rows that these hold, int64, as often as they are drawn.
        lengths: tokens of each training row.
    """
    entries = []
    for stage, of_stage, (steps, rows) in zip(stages, sources, drawn, strict=True):
        counts = np.bincount(rows, minlength=len(lengths))
        tokens = counts * lengths
        entries.append(
            {
                "name": stage.name,
                "steps": steps,
                "rows": len(rows),
                "tokens": int(tokens.sum()),
                "max_length": stage.max_length,
                "learning_rate_factor": stage.learning_rate_factor,
                "sources": {
                    source: {
                        "rows": len(own),
                        "rows_seen": int(counts[own].sum()),
                        "tokens_seen": int(tokens[own].sum()),
                        "times_seen": float(counts[own].mean()),
                    }
                    for source, (own, _) in of_stage.items()
                },
            }
        )
    return entries
