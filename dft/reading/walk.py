"""Walk directories and globs: links are followed once, hidden entries skipped, and what is left out is recorded."""

import glob
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dft.reading.streams import COMPRESSED

SUFFIXES = (".json", ".jsonl", ".parquet")
MAC_FOLDER, MAC_PREFIX = "__MACOSX", "._"  # what macOS adds to archives: the attributes of a file, not its text


@dataclass
class Findings:
    """The files that a directory or a glob names, and the paths that were left out on the way."""

    files: list[str] = field(default_factory=list)
    not_data: list[str] = field(default_factory=list)  # of another kind, inside a directory
    hidden: list[str] = field(default_factory=list)  # files and directories
    broken: list[str] = field(default_factory=list)  # links to nothing
    around: list[str] = field(default_factory=list)  # links to a directory that contains them
    repeated: list[str] = field(default_factory=list)  # other ways to what is found already
    unreadable: list[str] = field(default_factory=list)  # directories


def is_data_file(path: Path) -> bool:
    """Whether the suffix of a file is one that rows can be read from."""
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return path.suffix in SUFFIXES and path.suffix != ".parquet"
    return path.suffix in SUFFIXES


def find_below(directory: str) -> Findings:
    """Finds the data files in a directory and in those below it."""
    found = Findings()
    _add_below(directory, found, set())
    return _each_once(found)


def find_matches(pattern: str) -> Findings:
    """Finds the files that a glob matches, and the data files below the directories that it matches."""
    found = Findings()
    literal = set(pattern.split(os.sep))
    seen: set[str] = set()
    for path in sorted(set(_expand(pattern, found)), key=_own_paths_first):
        matched = [part for part in path.split(os.sep) if part not in literal]
        if any(part == MAC_FOLDER or part.startswith(MAC_PREFIX) for part in matched):
            found.hidden.append(path)
        elif os.path.islink(path) and _leads_around(path):
            found.around.append(path)
        elif os.path.isdir(path):
            if os.path.realpath(path) not in seen:
                _add_below(path, found, seen)
            elif os.path.islink(path):
                found.repeated.append(path)
        elif os.path.isfile(path):
            found.files.append(path)
        elif _is_broken(path):
            found.broken.append(path)
    return _each_once(found)


def _expand(pattern: str, found: Findings) -> list[str]:
    """The paths that a glob matches; its ** goes the way of a walk, and doesn't run in circles as glob's own does."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    start = parts.index("**")
    before = os.sep.join(parts[:start]) or (os.sep if pattern.startswith(os.sep) else "")
    rest = parts[start + 1 :]
    matches = []
    for top in glob.glob(before) if before else [""]:
        for directory, names in _walk(top, found, set()):
            if rest in ([], ["*"]):
                matches += [os.path.join(directory, name) for name in names]
            else:
                matches += _expand(os.path.join(glob.escape(directory), *rest), found)
    return matches


def _add_below(top: str, found: Findings, seen: set[str]) -> None:
    for directory, names in _walk(top, found, seen):
        for path in (os.path.join(directory, name) for name in names):
            if _is_broken(path):
                found.broken.append(path)
            elif is_data_file(Path(path)) and os.path.isfile(path):
                found.files.append(path)
            else:
                found.not_data.append(path)


def _walk(top: str, found: Findings, seen: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields a directory and those below it with the names of what is in them, but for directories.

    Each real directory is entered once: by its own path where there is one, else by the first link to it.

    Args:
        top: "" for the current directory.
        seen: the real paths of the directories that were entered; this adds to them.
    """
    directories, links = deque([top]), deque[str]()
    while directories or links:
        directory = directories.popleft() if directories else links.popleft()
        real = os.path.realpath(directory)
        if real in seen:
            found.repeated.append(directory)
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(directory or os.curdir))
        except OSError:
            found.unreadable.append(directory)
            continue
        others = []
        for name in names:
            path = os.path.join(directory, name)
            if name.startswith(".") or name == MAC_FOLDER:
                found.hidden.append(path)
            elif not os.path.isdir(path):
                others.append(name)
            elif not os.path.islink(path):
                directories.append(path)
            elif _leads_around(path):
                found.around.append(path)
            else:
                links.append(path)
        yield directory, others


def _leads_around(link: str) -> bool:
    """Whether a link leads to a directory that it is in itself."""
    return Path(os.path.realpath(os.path.dirname(link))).is_relative_to(os.path.realpath(link))


def _is_broken(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _each_once(found: Findings) -> Findings:
    """The same, with each file once, by its own path where that was found, in the order of the paths."""
    way_to: dict[str, str] = {}
    for path in sorted(set(found.files), key=_own_paths_first):
        if way_to.setdefault(os.path.realpath(path), path) != path:
            found.repeated.append(path)
    found.files = sorted(way_to.values())
    return found


def _own_paths_first(path: str) -> tuple[bool, bool, str]:
    """A key that sorts a file's own path before the links to it."""
    return os.path.islink(path), os.path.realpath(path) != os.path.abspath(path), path
