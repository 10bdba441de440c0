"""Prepared data: the tokenized rows of a run, as the cache keeps them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from dft.data.channels import Channels, choose_channels
from dft.data.report import SampleRow


@dataclass(frozen=True)
class RowPlaces:
    """Where rows stand: [R] each."""

    file: np.ndarray  # int32, index into report["files"]
    ordinal: np.ndarray  # int64, place among all rows of the file, from 0


@dataclass
class PreparedData:
    """The tokenized rows to train and to evaluate on, and the report on all others.

    The columns are input_ids and labels (int32 lists; -100 where nothing is supervised); where
    assistant turns are weighted, loss_weights (float32 lists); where there are channels, channel (int32).
    """

    train: Dataset
    evaluation: Dataset | None
    train_files: np.ndarray  # int32 [rows of train], index into report["files"]
    train_lines: np.ndarray  # int64 [rows of train], where the row begins in its file
    train_fields: np.ndarray  # int32 [rows of train], index into field_names
    lengths: np.ndarray  # int32 [rows of train], tokens
    longest: int  # tokens of the longest row, of training and evaluation
    report: dict[str, Any]  # see report.make_report
    samples: list[SampleRow]  # the first training row of each file
    directory: Path  # rejected.jsonl is there
    channels: list[str]  # names of the sources that have metrics of their own; empty for none
    field_names: list[str]  # what the rows' fields `channel` hold, "" for rows without
    train_places: RowPlaces
    evaluation_places: RowPlaces

    def source_of(self, index: int) -> str:
        """The file and line of a training row."""
        return f"{self.report['files'][self.train_files[index]]['path']}:{self.train_lines[index]}"

    @property
    def num_evaluation(self) -> int:
        """Rows to evaluate on."""
        return 0 if self.evaluation is None else len(self.evaluation)

    def ids_from(self, first: int) -> list[int]:
        """The token ids from `first` on that occur in the rows to train and to evaluate on, sorted."""
        found: set[int] = set()
        for rows in (self.train, self.evaluation):
            for chunk in [] if rows is None else rows.data.column("input_ids").chunks:
                ids = np.asarray(chunk.flatten())
                found.update(np.unique(ids[ids >= first]).tolist())
        return sorted(found)

    def training_lengths(self) -> list[np.ndarray]:
        """The lengths in tokens, int32, of the training rows of each file, as often as an epoch sees them."""
        return [self.lengths[self.train_files == i] for i in range(len(self.report["files"]))]


def load_prepared(directory: Path, channels: Channels = "auto") -> PreparedData:
    """Loads what build.build has written to a directory; the tokens stay on the disk.

    Args:
        channels: how rows are divided into channels, see channels.choose_channels.
    """
    tokens = Dataset.from_file(str(directory / "tokens.arrow"))
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    with np.load(directory / "rows.npz") as arrays:
        names = ("train", "evaluation", "file_index", "line", "ordinal", "length", "channel", "channel_names")
        train, evaluation, file, line, ordinal, length, of_field, field_names = (arrays[name] for name in names)
    _, first = np.unique(file[train], return_index=True)
    samples = [
        SampleRow(
            path=report["files"][file[i]]["path"],
            line=int(line[i]),
            input_ids=np.array(tokens[int(i)]["input_ids"]),
            labels=np.array(tokens[int(i)]["labels"]),
        )
        for i in train[np.sort(first)]
    ]
    paths = [entry["path"] for entry in report["files"]]
    channel_names, channel = choose_channels(channels, file, paths, of_field, field_names.tolist())
    if channel_names:
        tokens = tokens.add_column("channel", channel)
    return PreparedData(
        train=tokens.select(train),
        evaluation=tokens.select(evaluation) if len(evaluation) else None,
        train_files=file[train],
        train_lines=line[train],
        train_fields=of_field[train],
        lengths=length[train],
        longest=int(length.max()),
        report=report,
        samples=samples,
        directory=directory,
        channels=channel_names,
        field_names=field_names.tolist(),
        train_places=RowPlaces(file[train], ordinal[train]),
        evaluation_places=RowPlaces(file[evaluation], ordinal[evaluation]),
    )
