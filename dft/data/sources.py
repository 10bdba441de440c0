"""The data files of a run: each once, and on which side it is."""

import logging
from dataclasses import dataclass
from pathlib import Path

from dft.config.data import DataConfig
from dft.errors import UserError
from dft.reading.discovery import DataFile, find_data_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Data files, each once, and the paths of those to train and to evaluate on. A file may be on both sides."""

    files: list[DataFile]
    train: list[str]
    evaluation: list[str]  # empty where training rows are held out


def find_sources(config: DataConfig) -> Sources:
    """The files that --data_files and --eval_data_files name.

    Raises:
        UserError: some name nothing, or a file is on both sides with different samples.
    """
    train = find_data_files(config.data_files, "data_files", config.data_weights, keep_entries=config.mix is not None)
    evaluation = find_data_files(config.eval_data_files, "eval_data_files") if config.eval_data_files else []
    files = _merge(train, evaluation)
    path_of = {Path(file.path).resolve(): file.path for file in files}  # a file may be named in two ways
    sides = ([path_of[Path(file.path).resolve()] for file in side] for side in (train, evaluation))
    return Sources(files, *sides)


def _merge(train: list[DataFile], evaluation: list[DataFile]) -> list[DataFile]:
    known = {Path(file.path).resolve(): file for file in train}
    for file in evaluation:
        same = known.setdefault(Path(file.path).resolve(), file)
        if same is not file:
            logger.warning(
                "%s is both training and evaluation data: the evaluation says nothing about new rows", file.path
            )
            if same.max_rows != file.max_rows:
                raise UserError(
                    f"--data_files and --eval_data_files take different samples of {file.path}: give the same #N, or "
                    "let rows be held out with --validation_split_percentage"
                )
    return list(known.values())
