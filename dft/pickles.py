"""Look through pickles before anything loads them.

A pickle may name any function of any module, which loading it then calls. What a file names is found without calling
anything, and a file that names more than saved tensors and training states need is refused. DeepSpeed and
torch.distributed.checkpoint load their files without any check of their own.
"""

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from dft.errors import UserError
from dft.printable import printable

# what checkpoints name besides what torch itself takes for safe
OF_CHECKPOINTS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy._core.multiarray._reconstruct",  # of the random state
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
}
_METADATA_CLASSES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
    *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)
OF_METADATA = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in _METADATA_CLASSES),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "pathlib.PosixPath",
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}
METADATA_FILE = ".metadata"  # of torch.distributed.checkpoint, beside its .distcp files
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
NEVER_LOADED = ("training_args.bin",)  # older versions and other programs write it; it names classes of theirs
# the pickles that from_pretrained loads, and the files that it prefers to them
WEIGHTS = (("pytorch_model*.bin", "model*.safetensors"), ("adapter_model*.bin", "adapter_model*.safetensors"))
# what torch and pickle raise where the bytes that they read make no sense
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, IndexError, KeyError, TypeError, AttributeError, ImportError),
    *(struct.error, pickle.UnpicklingError, AssertionError),
)


def check_checkpoint(directory: Path) -> None:
    """Looks through all pickles of a checkpoint, in its folders too.

    Raises:
        UserError: some would run code, or can't be looked through; or `latest` or `latest_universal`, by which
            DeepSpeed finds its folder, names one that is elsewhere.
    """
    files = sorted(path for path in directory.rglob("*") if path.suffix in SUFFIXES or path.name == METADATA_FILE)
    for latest in filter(Path.is_file, directory.glob("latest*")):
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name != name or name == "..":
            raise UserError(f"{latest} names {name!r}; it must be the name of a folder beside it")
    _check(path for path in files if path.is_file() and path.name not in NEVER_LOADED)


def check_model(directory: str | Path) -> None:
    """Looks through the weights of a model or an adapter that are pickles, unless they are there as safetensors too.

    Args:
        directory: or the name of a model on the hub, of which nothing is looked at: transformers loads it with
            torch's own, stricter check.

    Raises:
        UserError: some would run code, or can't be looked through.
    """
    directory = Path(directory)
    _check(
        path
        for pattern, preferred in WEIGHTS
        if not any(directory.glob(preferred))
        for path in sorted(directory.glob(pattern))
    )


def _check(paths: Iterable[Path]) -> None:
    found = [(path, _problem(path)) for path in paths]
    problems = [f"  {printable(path)}: {problem}" for path, problem in found if problem is not None]
    if problems:
        raise UserError(
            "files that may run code when they are loaded are refused:\n"
            + "\n".join(problems)
            + "\nUse files from a source that you trust. Old ones can be saved anew: weights as safetensors, others "
            "by torch.save"
        )


def _problem(path: Path) -> str | None:
    """Why a file must not be loaded; None if it may be."""
    look: Callable[[Path], set[str]] = _named_by_metadata if path.name == METADATA_FILE else _named_by
    try:
        named = look(path)
    except UNREADABLE as error:
        reason = printable(" ".join(str(error).split()))
        return f"it can't be looked through, as it is not what torch.save writes ({reason})"
    return f"it calls {printable(', '.join(sorted(named)))}" if named else None


def _named_by(file: Path | io.BytesIO) -> set[str]:
    """The functions and classes that a file of torch.save names, but for those that are allowed."""
    return set(get_unsafe_globals_in_checkpoint(file)) - OF_CHECKPOINTS


class _Refused(pickle.UnpicklingError):
    """A pickle names this class or function, which it must not."""


class _MetadataReader(pickle.Unpickler):
    """Loads metadata with nothing but the classes that it consists of."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in OF_METADATA:
            raise _Refused(full_name)
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Loads the metadata of torch.distributed.checkpoint.

    Raises:
        UnpicklingError: it names other classes or functions than those that it consists of; or, as others of
            UNREADABLE, its bytes make no sense.
    """
    with open(path, "rb") as file:
        return _MetadataReader(file).load()


def _named_by_metadata(path: Path) -> set[str]:
    """The same for the metadata of torch.distributed.checkpoint and the objects other than tensors that they locate.

    Tensors are loaded with torch's own check.
    """
    try:
        metadata = read_metadata(path)
    except _Refused as error:
        return {str(error)}
    named = set()
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with open(path.parent / place.relative_path, "rb") as file:
                file.seek(place.offset)
                named |= _named_by(io.BytesIO(file.read(place.length)))
    return named
