"""Many chat files to tokenized datasets: read, validate, choose, tokenize, write, report.

    data = prepare_data(["data/"], None, ChatFormat(tokenizer), cache_dir="cache")       # train_dft.py's way
    data.train, data.evaluation, data.report

    rows = [row for row in load_conversations(["chats.jsonl"]) if isinstance(row, Conversation)]
    dataset, rejected = tokenize_dataset(rows, ChatFormat(tokenizer), max_length=8192)    # in a notebook

Files are read twice: first to validate and to choose, then to tokenize. What is in memory doesn't grow
with their size but for some 100 bytes a row. Only token arrays go into the `datasets` library. Per
file, rows read = rows kept + rows rejected + rows not sampled.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from dft.chat.format import ChatFormat
from dft.data.cache import CACHE_DIRECTORY, cached, data_key
from dft.data.channels import Channels
from dft.data.pipeline import (
    RowStatistics,
    TokenSettings,
    Truncation,
    pack,
    reject_untrainable,
    survey,
    table,
    tokenize_conversations,
    tokenize_files,
)
from dft.data.prepared import PreparedData, load_prepared
from dft.data.rejection_log import RejectionLog
from dft.data.report import FileStatistics, make_report
from dft.data.selection import Catalog, Selection, mix, select
from dft.data.worker_pool import WorkerPool
from dft.errors import UserError
from dft.reading.files import DataFile, find_data_files, read_rows
from dft.reading.formats import Conversation, RejectedRow, RowReader, detect_format, parse, read_file
from dist_logger import get_logger

logger = get_logger(__name__)


# ---- reading ------------------------------------------------------------------------------------


def load_conversations(
    paths: Iterable[str], data_format: str = "auto", role_map: dict[str, str] | None = None
) -> Iterator[Conversation | RejectedRow]:
    """Reads and validates files, row by row: conversations, and the rows that are broken or teach nothing.

    Args:
        data_format: one of data_formats.FORMATS, or auto: told for each file by its columns.
        role_map: other names of roles, {name: role}.

    Raises:
        UserError: a file can't be opened.
    """
    for path in paths:
        yield from map(reject_untrainable, read_file(path, data_format, role_map))


# ---- tokenizing ---------------------------------------------------------------------------------


def tokenize_dataset(
    conversations: Iterable[Conversation],
    chat_format: ChatFormat,
    max_length: int = 8192,
    truncation: Truncation = "right",
) -> tuple[Dataset, list[RejectedRow]]:
    """A dataset in memory, with the columns of PreparedData, and the rows that are not in it."""
    rows = list(conversations)
    results = tokenize_conversations(rows, chat_format, max_length, truncation)
    tokens = pack(results, rows)
    return Dataset(table(tokens, has_weights=tokens.weights is not None)), tokens.rejected


# ---- the whole way ------------------------------------------------------------------------------


def prepare_data(
    data_files: list[str],
    eval_data_files: list[str] | None,
    chat_format: ChatFormat,
    *,
    data_format: str = "auto",
    role_map: dict[str, str] | None = None,
    data_weights: list[float] | None = None,
    max_length: int = 8192,
    truncation: Truncation = "right",
    dedup: bool = False,
    drop_leaked: bool = False,
    validation_split_percentage: float = 5.0,
    max_eval_samples: int | None = 1000,
    data_validation: str = "standard",
    seed: int = 42,
    num_workers: int = 1,
    cache_dir: str | Path = CACHE_DIRECTORY,
    overwrite_cache: bool = False,
    progress: bool = True,
    channels: Channels = "auto",
) -> PreparedData:
    """From paths to tokenized training and evaluation rows, kept in a cache.

    Args:
        data_files, eval_data_files: see data_files.find_data_files. Without eval_data_files, a share of
            the training rows is held out.
        data_format, role_map: see load_conversations.
        data_weights: one for each entry of data_files: how often its rows are seen in an epoch.
        max_length: in tokens.
        truncation: the end that longer rows lose: right or left; drop rejects them, error stops.
        dedup, drop_leaked, validation_split_percentage, max_eval_samples: see data_selection.select.
        data_validation: what may be dropped, see RejectionLog.
        num_workers: processes that read and tokenize, at most one per core.
        overwrite_cache: prepare the data even if it is in the cache.
        channels: see load_prepared.

    Raises:
        UserError: files are missing, rows are refused, or nothing is left to train or evaluate on.
    """
    settings = {name: value for name, value in locals().items() if name != "channels"}
    return load_prepared(prepare_in_cache(**settings), channels)


def prepare_in_cache(
    data_files: list[str],
    eval_data_files: list[str] | None,
    chat_format: ChatFormat,
    *,
    num_workers: int,
    cache_dir: str | Path,
    overwrite_cache: bool,
    progress: bool,
    data_weights: list[float] | None = None,
    **settings: Any,
) -> Path:
    """The directory in the cache that holds what `prepare_data` gives; its arguments."""
    train = find_data_files(data_files, "data_files", data_weights)
    held_out = find_data_files(eval_data_files, "eval_data_files") if eval_data_files else []
    files = _merge_files(train, held_out)
    path_of = {Path(file.path).resolve(): file.path for file in files}
    sides = [[path_of[Path(file.path).resolve()] for file in some] for some in (train, held_out)]
    template = {"train_on": chat_format.train_on, "mask_thinking": chat_format.mask_thinking}
    described = {**settings, **template, "files": [vars(file) for file in files], "sides": sides}
    key = data_key([file.path for file in files], chat_format.tokenizer, described)
    build = partial(
        _build,
        files=files,
        sides=sides,
        chat_format=chat_format,
        num_workers=num_workers,
        progress=progress,
        **settings,
    )
    return cached(Path(cache_dir).expanduser(), key, build, overwrite_cache)


def _merge_files(train: list[DataFile], held_out: list[DataFile]) -> list[DataFile]:
    """Every file once."""
    known = {Path(file.path).resolve(): file for file in train}
    for file in held_out:
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


def _build(
    directory: Path,
    *,
    files: list[DataFile],
    sides: list[list[str]],
    chat_format: ChatFormat,
    data_format: str,
    role_map: dict[str, str] | None,
    max_length: int,
    truncation: Truncation,
    data_validation: str,
    seed: int,
    num_workers: int,
    progress: bool,
    **selection_settings: Any,
) -> None:
    """Fills a directory with tokens.arrow, rows.npz, report.json and rejected.jsonl."""
    readers = [_reader(file.path, data_format, role_map) for file in files]
    train_files, eval_files = ([i for i, file in enumerate(files) if file.path in side] for side in sides)
    with (
        RejectionLog(directory / "rejected.jsonl", data_validation, truncation) as rejected,
        WorkerPool(num_workers, TokenSettings(chat_format, max_length, truncation)) as pool,
    ):
        rows = survey(files, readers, pool, rejected, progress)
        rejected.stop()
        rejected.stop_if_nothing_is_left(int(np.isin(rows.file, train_files).sum()), sides[0], "data_files")
        chosen = select(rows, train_files, eval_files, seed=seed, **selection_settings)
        rejected.add(_dropped(rows, chosen, readers))
        wanted = chosen.train | chosen.evaluation
        statistics, written = tokenize_files(
            rows, wanted, readers, pool, rejected, directory / "tokens.arrow", progress
        )
        rejected.stop()
    train, evaluation = np.flatnonzero(chosen.train[written]), np.flatnonzero(chosen.evaluation[written])
    rejected.stop_if_nothing_is_left(len(train), sides[0], "data_files")
    if eval_files or chosen.evaluation.any():
        rejected.stop_if_nothing_is_left(len(evaluation), sides[1] or sides[0], "eval_data_files")
    report = make_report(_file_statistics(rows, chosen, readers, statistics, rejected))
    channel_names, channel = np.unique(np.concatenate([some.channel for some in statistics]), return_inverse=True)
    order = mix(rows.file[written][train], files, seed)
    np.savez(
        directory / "rows.npz",
        train=train if order is None else train[order],
        evaluation=evaluation,
        file_index=rows.file[written],
        line=np.concatenate([some.line for some in statistics]),
        length=np.concatenate([some.length for some in statistics]),
        channel=channel.astype(np.int32),
        channel_names=channel_names.astype(str),
    )
    (directory / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def _reader(path: str, data_format: str, role_map: dict[str, str] | None) -> RowReader:
    reader = RowReader(path, detect_format(path) if data_format == "auto" else data_format, role_map or {})
    logger.info("%s holds rows of the format %s", path, reader.format)
    return reader


def _dropped(rows: Catalog, chosen: Selection, readers: list[RowReader]) -> Iterator[RejectedRow]:
    """The rows that were asked to be dropped, read once more."""
    details = {"duplicate": "the same as an earlier row", "leaked": "the prompt of an evaluation row"}
    for number, reader in enumerate(readers):
        reason_of = {
            int(ordinal): reason
            for reason, which in chosen.dropped.items()
            for ordinal in rows.ordinal[which & (rows.file == number)]
        }
        for i, raw in enumerate(read_rows(reader.path) if reason_of else ()):
            if i in reason_of:
                reason = reason_of[i]
                text = raw.text or json.dumps(parse(raw), ensure_ascii=False, default=str)
                yield RejectedRow(reader.path, raw.line, reason, details[reason], text, is_malformed=False)


def _file_statistics(
    rows: Catalog,
    chosen: Selection,
    readers: list[RowReader],
    statistics: list[RowStatistics],
    rejected: RejectionLog,
) -> list[FileStatistics]:
    unwanted = ~(chosen.train | chosen.evaluation)
    for which in chosen.dropped.values():
        unwanted &= ~which
    return [
        FileStatistics(
            path=reader.path,
            format=reader.format,
            rows_read=rows.rows_read[i],
            not_sampled=int((unwanted & (rows.file == i)).sum()),
            duplicates=int((chosen.duplicate & (rows.file == i)).sum()),
            leaked=int((chosen.leaked & (rows.file == i)).sum()),
            rejected=rejected.reasons[reader.path],
            lengths=some.length,
            supervised=int(some.supervised.sum()),
            truncated=some.truncated,
            control_text=some.control_text,
            not_rendered=some.not_rendered,
        )
        for i, (reader, some) in enumerate(zip(readers, statistics, strict=True))
    ]
