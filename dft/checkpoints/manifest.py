"""The manifest of a checkpoint: what it was made with, and size and SHA-256 of every file; written last.

A directory on one disk has manifest.json. Where nodes write to disks of their own, the directory of a later node has
manifest-RANK.json, with the files that are there, so that all of them can be copied into one directory.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MANIFESTS = "manifest*.json"
VERSION = 1
THREADS = 8  # that read files; hashlib lets other threads run

Entry = dict[str, Any]  # size and sha256 of a file; in `earlier` those that it had before it was replaced
Manifest = dict[str, Any]


def manifest_name(first_rank: int) -> str:
    """The name of the manifest of the directory that rank `first_rank`, and none before it, writes to."""
    return MANIFEST if first_rank == 0 else f"manifest-{first_rank}.json"


def has_manifest(checkpoint: Path) -> bool:
    """Whether a checkpoint says what was written to it."""
    return any(checkpoint.glob(MANIFESTS))


def list_files(directory: Path) -> dict[str, int]:
    """The size of each file in a directory and those below it, by its path in that directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


def describe(path: Path) -> Entry:
    """The entry of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk, whoever has written them."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def flush_and_describe(directory: Path, names: Iterable[str], threads: int) -> dict[str, Entry]:
    """Waits until files are on the disk, and describes them meanwhile, from the memory that they were written from.

    Args:
        threads: files that are described at once.
    """
    names = list(names)
    with ThreadPoolExecutor(threads) as flushing, ThreadPoolExecutor(threads) as describing:
        flushed = [flushing.submit(flush, directory / name) for name in names]
        described = [describing.submit(describe, directory / name) for name in names]
        for done in flushed:
            done.result()
        return {name: done.result() for name, done in zip(names, described, strict=True)}


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, and on the disk when this returns."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)


def write_manifest(path: Path, content: Manifest) -> None:
    """Writes a manifest, with a hash of its own content.

    Args:
        content: made_with (see facts.run_facts), versions, step, and files, {name: entry}.
    """
    content = {"version": VERSION, **content}
    write_text(path, json.dumps({"sha256": _digest(content), **content}, indent=1) + "\n")


def read_manifests(checkpoint: Path) -> dict[str, Manifest]:
    """The manifests of a checkpoint by their names; none if it was saved without.

    Raises:
        ValueError: one of them is damaged, or of a version that isn't known. OSError: it can't be read.
    """
    found = {}
    for path in sorted(checkpoint.glob(MANIFESTS)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            is_whole = content.pop("sha256") == _digest(content) and isinstance(content["files"], dict)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: cut or damaged ({error})") from error
        if not is_whole:
            raise ValueError(f"{path}: cut or damaged (its content has another SHA-256)")
        if content["version"] != VERSION:
            raise ValueError(f"{path}: of version {content['version']}, which this program doesn't know")
        found[path.name] = content
    return found


def _digest(content: Manifest) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_damage(checkpoint: Path, manifests: Iterable[Manifest]) -> list[str]:
    """What is wrong with the files that are in the manifests, a line for each that isn't as it was written.

    Contents are compared only where all sizes are right: they take a second for every 1 to 2 GiB and thread.
    """
    entries = [(checkpoint / name, entry) for manifest in manifests for name, entry in manifest["files"].items()]
    damage = [_wrong_size(path, entry) for path, entry in entries]
    if not any(damage):
        with ThreadPoolExecutor(THREADS) as pool:
            damage = list(pool.map(lambda item: _wrong_content(*item), entries))
    return [line for line in damage if line is not None]


def _versions(entry: Entry) -> list[Entry]:
    return [entry, *([entry["earlier"]] if "earlier" in entry else [])]


def _wrong_size(path: Path, entry: Entry) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size in [version["size"] for version in _versions(entry)]:
        return None
    return f"{path}: {size} bytes, {entry['size']} were written"


def _wrong_content(path: Path, entry: Entry) -> str | None:
    try:
        found = describe(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    is_known = any(found.items() <= version.items() for version in _versions(entry))
    return None if is_known else f"{path}: damaged, its content isn't what was written (SHA-256)"


def replace_file(checkpoint: Path, name: str, text: str) -> None:
    """Replaces a file of a finished checkpoint, which stays whole at every moment.

    The manifest is written first, and knows both contents.
    """
    new = text.encode()
    entry = {"size": len(new), "sha256": hashlib.sha256(new).hexdigest()}
    for path, manifest in read_manifests(checkpoint).items():
        earlier = manifest["files"].get(name)
        if earlier is not None:
            earlier = {key: earlier[key] for key in ("size", "sha256")}
            manifest["files"][name] = entry | {"earlier": earlier}
            write_manifest(checkpoint / path, manifest)
    write_text(checkpoint / name, text)
