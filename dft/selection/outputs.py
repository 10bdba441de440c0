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
from dft.files import new_directory
from dft.printable import printable
from dft.reading.walk import SUFFIXES
from dft.selection.inputs import InputFile

KEPT_DIRECTORY = "kept"
DROPPED, REPORT, PAGE = "dropped.jsonl", "selection_report.json", "selection_report.html"
MAX_STEM = 50  # characters of a file's name, so that no file system finds it too long


def check_output(path: Path, files: list[InputFile], overwrite: bool) -> None:
    """Checks, before a row is read, that a selection can be written to a directory.

    Args:
        files: all that are read, those that are not selected from included.

    Raises:
        UserError: it holds something else, a selection that may not be replaced, or a file that is read.
    """
    flag = f"--output {printable(path)}"
    inside = [file.path for file in files if Path(file.real_path).is_relative_to(os.path.realpath(path))]
    if inside:
        raise UserError(f"{flag} holds {printable(inside[0])}, which is read: give another directory")
    parent = next(directory for directory in path.absolute().parents if directory.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} can't be written: {printable(parent)} is a file, not a directory")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} can't be written: {printable(parent)} allows no new files")
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{flag} is a file: give a directory")
    try:
        names = names_below(path)
    except OSError as error:
        raise UserError(f"{flag} can't be read: {error.strerror}") from error
    others = names - _own_names(path)
    if others:
        raise UserError(
            f"{flag} holds {printable(min(others))}, which is not of a selection: give a new or an empty directory"
        )
    if names and not overwrite:
        raise UserError(f"{flag} holds another selection: give another directory, or replace it with --overwrite")


def names_below(path: Path) -> set[str]:
    """All files and directories in a directory and below it, such as kept/a.jsonl; links are not followed.

    Raises:
        OSError: one can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    return {
        Path(directory, name).relative_to(path).as_posix()
        for directory, directories, files in os.walk(path, onerror=fail)
        for name in (*directories, *files)
    }


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
    room = None  # a directory beside the place, on the same file system
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".unfinished", dir=place.parent))
        new_directory(room / "new")
        yield room / "new"
        if place.exists():
            os.rename(place, room / "replaced")
        os.rename(room / "new", place)
    except OSError as error:
        raise UserError(f"--output {printable(path)} can't be written: {error.strerror or error}") from error
    finally:
        if room is not None:
            if not place.exists() and (room / "replaced").exists():
                os.rename(room / "replaced", place)  # stopped between the two renames
            shutil.rmtree(room, ignore_errors=True)


def output_names(paths: list[str]) -> list[str]:
    """A name for the kept rows of each file, which the trainer finds in a directory; no two are the same."""
    stems = []
    for ending in shortest_endings([Path(os.path.abspath(path)).parts[1:] for path in paths]):
        stem = ending.replace("/", "-")
        for suffix in (".gz", ".zst", *SUFFIXES):
            stem = stem.removesuffix(suffix)
        stems.append(printable(stem).lstrip("._")[-MAX_STEM:] or "rows")  # hidden files are skipped
    return [f"{name}.jsonl" for name in numbered(stems)]
