"""Content-addressed cache of prepared data; entries are published atomically."""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets.config import HF_DATASETS_CACHE
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from dft.errors import UserError
from dft.files import new_directory
from dft.printable import printable

logger = logging.getLogger(__name__)

CACHE_DIRECTORY = Path(HF_DATASETS_CACHE) / "dft"

CHECKSUMS = "checksums.json"  # {file of an entry: its CRC-32}
CHUNK = 1 << 20  # bytes

# the code that decides how text becomes tokens and labels
ROOMS = ("reading", "chat", "data")
PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")


def data_key(paths: Iterable[str], tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> str:
    """The name of a cache entry: 32 hexadecimal digits of a hash of everything that decides what is in it.

    Args:
        paths: data files, which are hashed by name and content.
        tokenizer: hashed with its chat template.
        settings: JSON values.
    """
    code = sorted(path for room in ROOMS for path in (Path(__file__).parents[1] / room).glob("*.py"))
    digest = hashlib.sha256()
    for part in (
        json.dumps(settings, sort_keys=True),
        tokenizer.backend_tokenizer.to_str(),
        json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], default=str),
        *(f"{name} {version(name)}" for name in PACKAGES),
        *(path.read_text(encoding="utf-8") for path in code),
        *(f"{path} {_content(path)}" for path in paths),
        str(date.today()) if "strftime_now" in (tokenizer.chat_template or "") else "",
    ):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:32]


def _content(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{printable(path)} can't be read: {error.strerror}") from error


def cached(
    directory: Path, key: str, build: Callable[[Path], None], overwrite: bool = False, *, shared: bool = False
) -> Path:
    """The directory of a cache entry, filled by `build` if it isn't there yet.

    Of several processes that want the same entry at once, one builds it and the others wait. An entry gets its name
    when it is whole, so that what a killed process left behind is never taken for one. An entry whose files have
    changed since, as by a disk that was full or failed, is made anew.

    Args:
        shared: a new cache gets the umask's mode, instead of being private to this user.

    Raises:
        UserError: the directory can't be written to; or by `build`.
    """
    target = directory / key
    unfinished, replaced = directory / f"{key}.unfinished", directory / f"{key}.replaced"
    start = time.time()
    lock = FileLock(directory / f"{key}.lock")
    try:
        new_directory(directory, shared=shared)
        lock.acquire()
    except OSError as error:
        raise UserError(f"--data_cache_dir {directory} can't be written to: {error.strerror}") from error
    try:
        if target.is_dir() and (not overwrite or target.stat().st_mtime > start):
            damage = find_damage(target)
            if damage is None:
                logger.info("Tokenized data from the cache: %s", target)
                return target
            logger.warning("The cache entry %s is damaged (%s): the data is prepared anew", target, damage)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        build(unfinished)
        written = {path.name: checksum(path) for path in sorted(unfinished.iterdir())}
        (unfinished / CHECKSUMS).write_text(json.dumps(written), encoding="utf-8")
        if target.is_dir():  # others may be reading it, so it is moved away whole
            target.rename(replaced)
        unfinished.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        free = shutil.disk_usage(directory).free / 2**30
        raise UserError(
            f"--data_cache_dir {directory}: {os.strerror(error.errno)}, {free:.1f} GiB are free; make room or choose "
            "another directory"
        ) from error
    finally:
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        lock.release()
    logger.info("Tokenized data kept in %s", target)
    return target


def find_damage(entry: Path) -> str | None:
    """What is wrong with the files of an entry, in words; None if they are as they were written.

    Other files, such as those that datasets puts beside a table, are not looked at.
    """
    try:
        written = json.loads((entry / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS}: {error}"
    if not isinstance(written, dict) or not written:
        return f"{CHECKSUMS} holds something else"
    for name, value in written.items():
        try:
            if checksum(entry / name) != value:
                return f"{name} is not what was written"
        except (OSError, ValueError) as error:
            return f"{name}: {error}"
    return None


def checksum(path: Path) -> int:
    """The CRC-32 of a file: against accidents, and faster than the disks that it is read from."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
