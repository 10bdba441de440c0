"""Output directories: made and checked before anything is computed that would be written there."""

import os
from pathlib import Path

from dft.errors import UserError


def make_directory(path: str, flag: str) -> Path:
    """Makes a directory for output, if it doesn't exist. Every rank does it, so that all stop if it can't be used.

    Args:
        flag: the setting that names the directory, for the error message.

    Returns:
        The directory.

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
