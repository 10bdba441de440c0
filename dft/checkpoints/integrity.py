"""Whether the files of a checkpoint are whole, told without loading them: by its manifest, else by their formats."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dft.checkpoints.manifest import find_damage, read_manifests
from dft.checkpoints.universal import latest_file, parts_folder
from dft.errors import UserError
from dft.pickles import UNREADABLE, read_metadata

# torch.save stores a checksum with every record. Reading takes a second or two per GiB, so in larger files only the
# records up to SMALL_RECORD bytes are read; that a file is cut is seen without reading it.
READ_WHOLE = 1 << 30
SMALL_RECORD = 1 << 24
# what zipfile raises where the bytes that it reads make no sense
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError, ValueError)
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*", "adapter_model*.bin")
REMEDY = "\nCopy it anew, or go on from the newest whole one with --resume_from_checkpoint last"
DEEPSPEED_PARTS = "global_step*"  # the directory that DeepSpeed writes its parts to
SAVED_BY_TORCH = (
    "*.pt",
    "*.pth",
    "pytorch_model*.bin",
    "adapter_model*.bin",
    "optimizer.bin",
    f"{DEEPSPEED_PARTS}/*.pt",
)


def check_whole(checkpoint: Path) -> None:
    """Checks that the files of a checkpoint are as they were written.

    Without a manifest, this is told by the formats of the files, as far as that is possible without loading them.

    Raises:
        UserError: it names all that are not.
    """
    try:
        manifests = read_manifests(checkpoint)
    except (OSError, ValueError) as error:
        raise _not_whole(checkpoint, [str(error)]) from error
    damaged = find_damage(checkpoint, manifests.values()) if manifests else _damage_by_formats(checkpoint)
    if damaged:
        raise _not_whole(checkpoint, damaged)


def _damage_by_formats(checkpoint: Path) -> list[str]:
    checks: list[tuple[str, Callable[[Path], str | None]]] = [
        ("*.json", _damage_of_json),
        ("*.safetensors", _damage_of_safetensors),
        *((pattern, _damage_of_torch_file) for pattern in SAVED_BY_TORCH),
        ("*/.metadata", _damage_of_shards),
    ]
    found = [(path, check(path)) for pattern, check in checks for path in sorted(checkpoint.glob(pattern))]
    damaged = [f"{path}: {damage}" for path, damage in found if damage is not None]
    return damaged + [f"{checkpoint / name}: missing" for name in _missing_shards(checkpoint)]


def check_complete(checkpoint: Path) -> None:
    """Checks that a checkpoint holds all that a training goes on from.

    Raises:
        UserError: it holds the model alone, or a part is missing.
    """
    has_shards = any(checkpoint.glob(DEEPSPEED_PARTS))
    if not has_shards and not any(checkpoint.glob("optimizer*")):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it holds the model alone (--save_only_model). Start a new run "
            f"from it with --model_name_or_path {checkpoint}"
        )
    missing = []
    if has_shards:
        latest = latest_file(checkpoint)
        if not latest.is_file() or not parts_folder(checkpoint).is_dir():
            missing.append(latest.name)
    else:
        missing += [] if any(checkpoint.glob("scheduler.pt")) else ["scheduler.pt"]
        missing += _missing_of_fsdp(checkpoint)
        missing += [] if any(path for name in WEIGHTS for path in checkpoint.glob(name)) else ["model.safetensors"]
    if not any(checkpoint.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    if missing:
        raise _not_whole(
            checkpoint, [f"{checkpoint / name}: missing, or it names what is missing" for name in missing]
        )


def _not_whole(checkpoint: Path, problems: list[str]) -> UserError:
    return UserError(
        f"--resume_from_checkpoint {checkpoint}: not a whole checkpoint\n  " + "\n  ".join(problems) + REMEDY
    )


def _damage_of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"cut or damaged ({error})"
    return None if isinstance(content, dict) else "cut or damaged (not a JSON object)"


def _damage_of_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, "pt"):  # compares the sizes in its header with that of the file
            return None
    except (OSError, SafetensorError) as error:
        return f"cut or damaged ({error})"


def _damage_of_torch_file(path: Path) -> str | None:
    """What is wrong with a file that torch.save wrote, which is a zip file; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:  # reads the list of records at its end
            records = archive.infolist()
            if not any(record.filename.endswith("data.pkl") for record in records):
                return "damaged (nothing in it that torch has saved)"
            is_small = path.stat().st_size <= READ_WHOLE
            for record in records:
                if is_small or record.file_size <= SMALL_RECORD:
                    with archive.open(record) as content:  # compares checksums when it reads to the end
                        while content.read(1 << 20):
                            pass
    except ZIP_ERRORS as error:
        return f"cut or damaged ({error})"
    return None


def _damage_of_shards(metadata: Path) -> str | None:
    """What is wrong with a directory of shards that FSDP wrote; None if nothing is.

    Each .distcp file is a row of files such as torch.save writes, whose places the metadata holds.
    """
    try:
        pieces = read_metadata(metadata).storage_data.values()
    except UNREADABLE as error:
        return f"cut or damaged ({error})"
    for piece in pieces:
        path = metadata.parent / piece.relative_path
        if not path.is_file() or path.stat().st_size < piece.offset + piece.length:
            return f"cut or damaged ({path.name} is missing or cut)"
        if path.stat().st_size > READ_WHOLE and piece.length > SMALL_RECORD:
            continue
        with path.open("rb") as file:
            file.seek(piece.offset)
            try:
                with zipfile.ZipFile(io.BytesIO(file.read(piece.length))) as archive:
                    damaged = archive.testzip()
            except ZIP_ERRORS as error:
                return f"cut or damaged ({path.name}: {error})"
        if damaged is not None:
            return f"cut or damaged ({path.name}: {damaged})"
    return None


def _missing_of_fsdp(checkpoint: Path) -> list[str]:
    """What a checkpoint that FSDP wrote lacks: its weights, whole or in shards, or what says where the shards are."""
    weights = checkpoint / "pytorch_model_fsdp_0"
    if (checkpoint / "optimizer.bin").exists():
        return [] if weights.with_name("pytorch_model_fsdp.bin").exists() else ["pytorch_model_fsdp.bin"]
    shards = (checkpoint / "optimizer_0", weights)
    if not any(directory.is_dir() for directory in shards):
        return []
    return [f"{directory.name}/.metadata" for directory in shards if not (directory / ".metadata").is_file()]


def _missing_shards(checkpoint: Path) -> list[str]:
    """Files that the index of a model in shards names, and that aren't there."""
    names: set[str] = set()
    for path in checkpoint.glob("*.index.json"):
        try:
            names.update(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # the check of JSON files has named it
    return sorted(name for name in names if not (checkpoint / name).is_file())
