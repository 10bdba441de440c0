"""Find the data files that paths, directories and globs name."""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dft.errors import UserError
from dft.files import expand_path
from dft.printable import printable
from dft.reading.walk import SUFFIXES, Findings, find_below, find_matches, is_data_file

logger = logging.getLogger(__name__)

SAMPLED_PATTERN = re.compile(r"(.+)#(\d+)")
EXAMPLES = 5  # paths that a message names


@dataclass(frozen=True)
class DataFile:
    """One data file and how much of it is used."""

    path: str
    max_rows: int | None = None  # the size of a random sample of its rows; None: all rows
    weight: float = 1.0  # how often each of its rows is seen in an epoch
    entry: int | None = None  # the place in the list of the pattern that names it, from 0; None where it is of no use


def find_data_files(
    patterns: list[str], flag: str, weights: list[float] | None = None, *, keep_entries: bool = False
) -> list[DataFile]:
    """Finds the files that paths, directories and globs name, in order, each once.

    Args:
        patterns: each may end with #N, for a random sample of at most N rows from each of its files.
        flag: the name of the flag that holds the patterns, for errors.
        weights: one for each pattern, see DataFile.
        keep_entries: files know which pattern names them, and no two may.

    Raises:
        UserError: some patterns name nothing, or a file of another kind; all are listed.
    """
    if weights is not None and len(weights) != len(patterns):
        raise UserError(f"--data_weights has {len(weights)} values for {len(patterns)} --{flag}: give one for each")
    file_of: dict[Path, DataFile] = {}
    problems = []
    repeated = []
    for entry, (pattern, weight) in enumerate(zip(patterns, weights or [1.0] * len(patterns), strict=True)):
        whole = expand_path(pattern, f"--{flag}")
        sample = None if Path(whole).exists() else SAMPLED_PATTERN.fullmatch(whole)
        name, max_rows = (sample[1], int(sample[2])) if sample else (whole, None)
        found = _find(Path(name))
        problems += _what_is_missing(pattern, Path(name), found)
        _report(name, found)
        for path in found.files:
            file = DataFile(path, max_rows, weight, entry if keep_entries else None)
            earlier = file_of.setdefault(Path(path).resolve(), file)
            problems += _problems(file, earlier)
            repeated += [] if earlier is file else [path]
    if problems:
        raise UserError(f"--{flag}:\n" + "\n".join(problems))
    if repeated:
        logger.info("--%s names %s more than once; read once: %s", flag, _count(repeated, "file"), _examples(repeated))
    return list(file_of.values())


def _find(path: Path) -> Findings:
    """The file itself, the data files below a directory, or the files that a glob matches."""
    if path.is_file():
        return Findings([str(path)])
    return find_below(str(path)) if path.is_dir() else find_matches(str(path))


def _what_is_missing(pattern: str, path: Path, found: Findings) -> list[str]:
    """Errors for a pattern that names nothing, and for directories that can't be read."""
    problems = [f"  {printable(directory)}: this directory can't be read" for directory in found.unreadable]
    if found.files or problems:
        return problems
    if path.is_symlink() and not path.exists():
        return [f"  {printable(pattern)}: a broken link, to {printable(os.readlink(path))}"]
    if path.is_dir():
        what = "no data file in this directory"
    else:
        what = "neither a file nor a directory" if path.exists() else "no such file"
    left_out = [
        _count(paths, kind) for paths, kind in ((found.hidden, "hidden entry"), (found.broken, "broken link")) if paths
    ]
    return [f"  {printable(pattern)}: {what}" + (f", only {' and '.join(left_out)}" if left_out else "")]


def _report(name: str, found: Findings) -> None:
    """Logs what was left out below a directory or by a glob."""
    levels: list[tuple[Callable[..., None], list[str], str, str]] = [
        (logger.warning, found.broken, "broken link", "skipped"),
        (logger.warning, found.around, "link", "not followed, as they lead to a directory that contains them"),
        (logger.warning, found.not_data, "file", f"skipped, whose names don't end in {', '.join(SUFFIXES)}"),
        (logger.info, found.hidden, "hidden entry", "skipped; a hidden path that is given itself is read"),
        (logger.info, found.repeated, "path", "skipped, which lead to what is read already"),
    ]
    for log, paths, kind, what in levels:
        if paths:
            log("%s: %s %s: %s", printable(name), _count(paths, kind), what, _examples(paths, name))


def _count(paths: list[str], kind: str) -> str:
    number = len(set(paths))
    plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    return f"{number} {kind if number == 1 else plural}"


def _examples(paths: list[str], below: str = "") -> str:
    """The first few of some paths, as they are called below a directory, with the targets of links."""
    different = list(dict.fromkeys(paths))
    names = []
    for path in different[:EXAMPLES]:
        target = f" -> {os.readlink(path)}" if os.path.islink(path) else ""
        names.append(printable(path.removeprefix(below + os.sep) + target))
    return ", ".join(names) + (", …" if len(different) > EXAMPLES else "")


def _problems(file: DataFile, earlier: DataFile) -> list[str]:
    """Why a file can't be read, or contradicts the `earlier` pattern that named it too; empty if all is well."""
    if not is_data_file(Path(file.path)):
        return [f"  {printable(file.path)}: not a {', '.join(SUFFIXES)} file (docs/data.md: how to convert a table)"]
    if (earlier.max_rows, earlier.weight) != (file.max_rows, file.weight):
        return [f"  {printable(file.path)}: named twice, with different samples or weights"]
    if earlier.entry != file.entry:
        return [f"  {printable(file.path)}: named twice, and --mix has a ratio for each name"]
    if file.path.encode("utf-8", "replace").decode() != file.path:
        return [f"  {file.path!a}: rename it, the name is not UTF-8"]
    return []
