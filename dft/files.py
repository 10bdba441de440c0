"""Paths in settings, and output directories, made before anything is computed that would be written there."""

import argparse
import atexit
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import SoftFileLock, Timeout

from dft.errors import UserError
from dft.printable import printable

logger = logging.getLogger(__name__)

PRIVATE = 0o700  # the mode of a directory that only this user can enter, whatever the modes inside are
LOCK = "_lock"  # in an output directory while a run writes to it
VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def make_directory(path: str, flag: str, *, shared: bool = False) -> Path:
    """Makes a directory for output, if it doesn't exist. Every rank does it, so that all stop if it can't be used.

    Args:
        flag: the setting that names the directory, for the error message.
        shared: it gets the umask's mode, instead of being private to this user.

    Returns:
        The directory.

    Raises:
        UserError: it can't be made or written to.
    """
    try:
        new_directory(path, shared=shared)
    except OSError as error:
        raise UserError(f"{flag} {path} can't be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} can't be written to: choose another directory or change its permissions")
    return Path(path)


def take_directory(path: Path, flag: str) -> None:
    """Keeps other runs out of a directory until this process ends. The lock of a process that is gone is taken over.

    Args:
        flag: the setting that names the directory, for the error message.

    Raises:
        UserError: another run has taken it.
    """
    lock = SoftFileLock(path / LOCK, mode=0o600)
    try:
        lock.acquire(timeout=1.0)  # it takes a second try to take over a lock
    except Timeout:
        holder = " on ".join((path / LOCK).read_text(encoding="utf-8").split()[:2])
        raise UserError(
            f"{flag} {path} is in use by another run, process {holder}: give another directory, or end that run. If "
            f"it was on a machine that is gone, delete {path / LOCK}"
        ) from None
    atexit.register(lock.release)


def check_writable(path: Path, flag: str) -> None:
    """Raises UserError where a file can't be written, before the work for it is done for nothing."""
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {printable(path)} can't be written: give a file in a directory that exists")


@contextmanager
def dispensable(path: Path) -> Iterator[None]:
    """Inside, a file is written that tells of a run and that it can do without: if that fails, a warning says so.

    There is one warning for each file, however often it is written.
    """
    try:
        yield
    except OSError as error:
        warn_of_loss(path, error.strerror or str(error))


@cache
def warn_of_loss(path: Path, reason: str) -> None:
    """Says, once, that a file can't be written that tells of the run."""
    logger.warning("%s can't be written (%s): the run goes on without it", path, reason)


def new_directory(path: str | Path, *, shared: bool = False) -> None:
    """Makes a directory, if it doesn't exist; one that exists keeps its mode.

    Raises:
        OSError: it can't be made.
    """
    Path(path).mkdir(0o777 if shared else PRIVATE, parents=True, exist_ok=True)


def expand_path(path: str, flag: str) -> str:
    """A path with ~ and environment variables such as $HOME replaced; one that exists as it stands is left alone.

    Args:
        flag: the setting that holds the path, for the error message.

    Raises:
        UserError: a variable isn't set.
    """
    if os.path.lexists(path):
        return path
    names = [match[1] or match[2] for match in VARIABLE.finditer(path)]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"{flag} {path}: the environment variable {missing[0]} isn't set")
    return os.path.expanduser(os.path.expandvars(path))


def path_argument(text: str) -> Path:
    """A path on the command line of a script, for argparse."""
    try:
        return Path(expand_path(text, "path"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
