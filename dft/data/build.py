"""From files to what the cache keeps: tokens, the chosen rows, the report and the rejected rows.

Files are read twice: first to validate and to choose, then to tokenize. Memory grows by some 100 bytes a row, not with
the size of the files. Per file, rows read = rows kept + rows rejected + rows not sampled.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dft.chat.format import ChatFormat
from dft.config.data import DataConfig
from dft.data.pipeline import RowStatistics, TokenSettings, survey, tokenize_files
from dft.data.rejection_log import RejectionLog
from dft.data.report import FileStatistics, describe_mix, make_report
from dft.data.selection import Catalog, Selection, mix, mix_files, select
from dft.data.sources import Sources
from dft.data.worker_pool import WorkerPool
from dft.reading.formats import RowReader, detect_format, parse, written_row
from dft.reading.raw_rows import read_rows
from dft.reading.rows import RejectedRow

logger = logging.getLogger(__name__)


def build(
    directory: Path, sources: Sources, config: DataConfig, chat_format: ChatFormat, *, seed: int, progress: bool
) -> None:
    """Fills a directory with tokens.arrow, rows.npz, report.json and rejected.jsonl, see prepared.load_prepared.

    Raises:
        UserError: rows are refused, or nothing is left to train or to evaluate on.
    """
    files = sources.files
    readers = [_reader(file.path, config) for file in files]
    train_files, eval_files = (
        [i for i, file in enumerate(files) if file.path in side] for side in (sources.train, sources.evaluation)
    )
    settings = TokenSettings(chat_format, config.max_length, config.truncation)
    with (
        RejectionLog(directory / "rejected.jsonl", config.data_validation, config.truncation) as rejected,
        WorkerPool(config.preprocessing_num_workers, settings) as pool,
    ):
        rows = survey(files, readers, pool, rejected, progress)
        rejected.stop()
        rejected.stop_if_nothing_is_left(int(np.isin(rows.file, train_files).sum()), sources.train, "data_files")
        chosen = select(rows, train_files, eval_files, config, seed)
        rejected.add(_dropped(rows, chosen, readers))
        wanted = chosen.train | chosen.evaluation
        path = directory / "tokens.arrow"
        statistics, written = tokenize_files(rows, wanted, readers, pool, rejected, path, progress)
        rejected.stop()
    train, evaluation = np.flatnonzero(chosen.train[written]), np.flatnonzero(chosen.evaluation[written])
    rejected.stop_if_nothing_is_left(len(train), sources.train, "data_files")
    if eval_files or chosen.evaluation.any():
        rejected.stop_if_nothing_is_left(len(evaluation), sources.evaluation or sources.train, "eval_data_files")
    report = make_report(_file_statistics(rows, chosen, readers, statistics, rejected))
    channel_names, channel = np.unique(np.concatenate([entry.channel for entry in statistics]), return_inverse=True)
    file, length = rows.file[written], np.concatenate([entry.length for entry in statistics])
    mixed = mix_files(file[train], length[train], files, config)
    order = mix(file[train], mixed, seed)
    if config.mix_ratios:
        report["mix"] = describe_mix(config, mixed, file[train], order)
    np.savez(
        directory / "rows.npz",
        train=train if order is None else train[order],
        evaluation=evaluation,
        file_index=file,
        line=np.concatenate([entry.line for entry in statistics]),
        ordinal=rows.ordinal[written],
        length=length,
        channel=channel.astype(np.int32),
        channel_names=channel_names.astype(str),
    )
    (directory / "report.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")


def _reader(path: str, config: DataConfig) -> RowReader:
    data_format = detect_format(path) if config.data_format == "auto" else config.data_format
    logger.info("%s is read as rows of the format %s", path, data_format)
    return RowReader(path, data_format, config.roles)


def _dropped(rows: Catalog, chosen: Selection, readers: list[RowReader]) -> Iterator[RejectedRow]:
    """The rows that were dropped on request, read once more for their text."""
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
                text = raw.text or written_row(parse(raw))
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
            lengths=kept.length,
            supervised=int(kept.supervised.sum()),
            truncated=kept.truncated,
            control_text=kept.control_text,
            remarks=kept.remarks,
        )
        for i, (reader, kept) in enumerate(zip(readers, statistics, strict=True))
    ]
