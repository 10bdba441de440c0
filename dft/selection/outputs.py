"""The output directory: written beside its place, and given its name when it is whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dft.data.names import numbered, shortest_endings
from dft.errors import UserError
from dft.printable import printable
from dft.reading.walk import SUFFIXES
from dft.selection.inputs import InputFile

KEPT_DIRECTORY = "kept"
DROPPED, REPORT, PAGE = "dropped.jsonl", "selection_report.json", "selection_report.html"
MAX_STEM = 50  # characters of a file's name, so that no file system finds it too long


def check_output(path: Path, files: list[InputFile], overwrite: bool) -> None:
    """Checks, before a row is read, that a selection can be written to a directory.

    Raises:
        UserError: it holds something else, a selection that may not be replaced, or a file that is read.
    """
    flag = f"--output {printable(path)}"
    inside = [file.path for file in files if Path(file.real_path).is_relative_to(os.path.realpath(path))]
    if inside:
        raise UserError(f"{flag} holds {printable(inside[0])}, which is read: give another directory")
    parent = next(directory for directory in path.absolute().parents if directory.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} can't be written: {printable(parent)} allows no new files")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{flag} is a file: give a directory")
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise UserError(f"{flag} can't be read: {error.strerror}") from error
    others = names - _own_names(path)
    if others:
        raise UserError(
            f"{flag} holds {printable(min(others))}, which is not of a selection: give a new or an empty directory"
        )
    if names and not overwrite:
        raise UserError(f"{flag} holds another selection: give another directory, or replace it with --overwrite")


def _own_names(path: Path) -> set[str]:
    """What a selection in a directory has written there, by its report; empty if there is none."""
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    written = report.get("written") if isinstance(report, dict) else None
    return {name for name in written if isinstance(name, str)} if isinstance(written, list) else set()


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Gives a directory to write to, which then takes the place of `path`, and of what is there; else it is removed.

    Raises:
        UserError: it can't be written.
    """
    place = Path(os.path.realpath(path))
    staged = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".unfinished", dir=place.parent))
        yield staged
        if place.exists():
            replaced = staged / "replaced"
            os.rename(place, replaced)
            _swap(staged, replaced, place)
        else:
            os.rename(staged, place)
    except OSError as error:
        raise UserError(f"--output {printable(path)} can't be written: {error.strerror or error}") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def _swap(staged: Path, replaced: Path, place: Path) -> None:
    """Publishes a directory that holds the one which it replaces; if that fails, the latter comes back."""
    try:
        os.rename(staged, place)
    except OSError:
        os.rename(replaced, place)
        raise
    shutil.rmtree(place / replaced.name)


def output_names(paths: list[str]) -> list[str]:
    """A name for the kept rows of each file, which the trainer finds in a directory; no two are the same."""
    stems = []
    for ending in shortest_endings([Path(os.path.abspath(path)).parts[1:] for path in paths]):
        stem = ending.replace("/", "-")
        for suffix in (".gz", ".zst", *SUFFIXES):
            stem = stem.removesuffix(suffix)
        stems.append(printable(stem).lstrip("._")[-MAX_STEM:] or "rows")  # hidden files are skipped
    return [f"{name}.jsonl" for name in numbered(stems)]
