"""Wheels made smaller for a pack, and whole again.

    python -m benchmarks.gpu.wheels squeeze FILE.whl FILE.whl.xz
    python -m benchmarks.gpu.wheels expand DIRECTORY TARGET     # also copies wheels that were not squeezed

A wheel compresses each of its files alone; the same files uncompressed, and xz around them, take a third less.
"""

import argparse
import io
import lzma
import shutil
import zipfile
from pathlib import Path


def squeeze(wheel: Path, target: Path) -> None:
    """Writes a wheel with xz around it."""
    stored = io.BytesIO()
    with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(stored, "w", zipfile.ZIP_STORED) as whole:
        for entry in packed.infolist():
            content = packed.read(entry)
            entry.compress_type = zipfile.ZIP_STORED
            whole.writestr(entry, content)
    target.write_bytes(lzma.compress(stored.getvalue()))


def expand(directory: Path, target: Path) -> None:
    """Writes the wheels of a directory into another one, as pip takes them."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.glob("*.whl.xz")):
        with lzma.open(path) as source, open(target / path.stem, "wb") as wheel:
            shutil.copyfileobj(source, wheel)
    for path in directory.glob("*.whl"):
        shutil.copyfile(path, target / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["squeeze", "expand"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    {"squeeze": squeeze, "expand": expand}[args.action](args.source, args.target)


if __name__ == "__main__":
    main()
