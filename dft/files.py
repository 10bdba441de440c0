"""Output directories, checked before anything is computed for them."""

import os
from pathlib import Path

from dft.errors import UserError


def make_directory(path: str, flag: str) -> Path:
    """Makes a directory that is written to. Every rank does it, so that all find out together if they can't.

    Args:
        flag: the setting that names it, for the error.

    Raises:
        UserError: it can't be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path} can't be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} can't be written to: choose another directory or change its permissions")
    return Path(path)
