"""Files of log-probabilities by the starting weights: one for the run, and one that other runs find.

A file is named after the tokens and labels of the rows, and after the model: its name, configuration and files.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from datasets import Dataset as HFDataset
from datasets.config import HF_DATASETS_CACHE
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from dft.digest import digest_of_rows
from dft.files import new_directory

logger = logging.getLogger(__name__)

CACHE_DIRECTORY = Path(HF_DATASETS_CACHE) / "dft" / "reference"
RUN_DIRECTORY = "reference"  # in the output directory
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")

Values = tuple[np.ndarray, np.ndarray]  # of all supervised tokens, float32 [N], and their number in each row, int [R]


def file_name(rows: Dataset, model: PreTrainedModel) -> str:
    """The name of the file for these rows and this model."""
    return f"{_digest_of_rows(rows)}_{_digest_of_model(model)}.npz"


def _digest_of_rows(rows: Dataset) -> str:
    """A hash of tokens and labels."""
    if isinstance(rows, HFDataset):
        return digest_of_rows(rows)
    digest = hashlib.blake2b(digest_size=8)
    for index in range(len(rows)):
        row = rows[index]
        for name in ("input_ids", "labels"):
            digest.update(np.asarray(row[name], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def _digest_of_model(model: PreTrainedModel) -> str:
    """A hash of a model's configuration and name, and of the sizes and times of its files if it is a directory."""
    config = model.config.to_dict()
    path = Path(model.config._name_or_path or ".")
    files = sorted(file for pattern in WEIGHT_FILES for file in path.glob(pattern)) if path.name else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    told = json.dumps([config, str(path), facts], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def load(directories: Iterable[Path], name: str) -> Values | None:
    """The values of the first file of this name; None if there is none, or it is damaged, which is said."""
    for path in (directory / name for directory in directories):
        try:
            with np.load(path, allow_pickle=False) as file:
                return file["values"], file["counts"]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # zipfile, zlib and numpy each have their own for a file that was cut
            logger.warning("%s can't be read (%s): what it held is computed again", path, error)
            remove([path.parent], name)
    return None


def remove(directories: Iterable[Path], name: str) -> None:
    """Removes the files of this name, as far as that is allowed."""
    for directory in directories:
        with suppress(OSError):
            (directory / name).unlink()


def save(directories: Iterable[Path], name: str, values: Values) -> None:
    """Writes the values into each directory; a directory that can't be written to is said and passed over."""
    for directory in directories:
        unfinished = directory / f"{name}.{os.getpid()}.unfinished"
        try:
            new_directory(directory)
            with open(unfinished, "wb") as file:
                np.savez(file, values=values[0], counts=values[1])
            os.replace(unfinished, directory / name)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            logger.warning("Values that were computed are not kept in %s: %s", directory, error)
