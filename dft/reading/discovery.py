"""Find the data files that paths, directories and globs name."""

import glob
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from dft.errors import UserError
from dft.reading.streams import COMPRESSED

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet")
SAMPLED_PATTERN = re.compile(r"(.+)#(\d+)")


@dataclass(frozen=True)
class DataFile:
    """One data file and how much of it is used."""

    path: str
    max_rows: int | None = None  # the size of a random sample of its rows; None: all rows
    weight: float = 1.0  # how often each of its rows is seen in an epoch


def find_data_files(patterns: list[str], flag: str, weights: list[float] | None = None) -> list[DataFile]:
    """Finds the files that paths, directories and globs name, in order, each once.

    Args:
        patterns: each may end with #N, for a random sample of at most N rows from each of its files.
        flag: the name of the flag that holds the patterns, for errors.
        weights: one for each pattern, see DataFile.

    Raises:
        UserError: some patterns name nothing, or a file of another kind; all are listed.
    """
    if weights is not None and len(weights) != len(patterns):
        raise UserError(f"--data_weights has {len(weights)} values for {len(patterns)} --{flag}: give one for each")
    found: dict[Path, DataFile] = {}
    problems = []
    for pattern, weight in zip(patterns, weights or [1.0] * len(patterns), strict=True):
        sample = None if Path(pattern).exists() else SAMPLED_PATTERN.fullmatch(pattern)
        name, max_rows = (sample[1], int(sample[2])) if sample else (pattern, None)
        path = Path(name).expanduser()
        files = _matching_files(path)
        if not files:
            what = "no data file in this directory" if path.is_dir() else "no such file"
            problems.append(f"  {pattern}: {what}")
        for file_path in files:
            file = DataFile(file_path, max_rows, weight)
            problems += _problems(file, earlier=found.setdefault(Path(file_path).resolve(), file))
    if problems:
        raise UserError(f"--{flag}:\n" + "\n".join(problems))
    return list(found.values())


def _matching_files(path: Path) -> list[str]:
    """The file itself, the data files below a directory, or the files that a glob matches."""
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        return sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
    everything = sorted(str(p) for p in path.rglob("*") if not p.is_dir())
    files = [f for f in everything if is_data_file(Path(f)) and Path(f).is_file()]
    if skipped := sorted(set(everything) - set(files)):
        names = ", ".join(Path(f).name for f in skipped[:5])
        logger.warning("%s: %d files that are not data are skipped: %s", path, len(skipped), names)
    return files


def _problems(file: DataFile, earlier: DataFile) -> list[str]:
    """Why a file can't be read, or contradicts the `earlier` pattern that named it too; empty if all is well."""
    if not is_data_file(Path(file.path)):
        return [f"  {file.path}: not a {', '.join(SUFFIXES)} file"]
    if (earlier.max_rows, earlier.weight) != (file.max_rows, file.weight):
        return [f"  {file.path}: named twice, with different samples or weights"]
    if file.path.encode("utf-8", "replace").decode() != file.path:
        return [f"  {file.path!a}: rename it, the name is not UTF-8"]
    return []


def is_data_file(path: Path) -> bool:
    """Whether the suffix of a file is one that rows can be read from."""
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return path.suffix in SUFFIXES and path.suffix != ".parquet"
    return path.suffix in SUFFIXES
