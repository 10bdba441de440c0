"""The steps from files to token arrays, in several processes: survey, tokenize, write."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Features, List, Value
from tqdm.auto import tqdm

from dft.chat.example import Example, truncate
from dft.chat.format import ChatFormat
from dft.config.data import Truncation
from dft.data.rejection_log import RejectionLog
from dft.data.selection import Catalog, digests
from dft.data.worker_pool import WorkerPool
from dft.errors import UserError
from dft.reading.discovery import DataFile
from dft.reading.formats import RowReader
from dft.reading.raw_rows import read_rows
from dft.reading.rows import Conversation, RawRow, RejectedRow, RowError
from dft.reading.untrainable import reject, reject_untrainable

ROWS_PER_TASK = 256
CHARACTERS_PER_TASK = 1 << 21
TOKENS = {"input_ids": List(Value("int32")), "labels": List(Value("int32"))}
WEIGHTS = {"loss_weights": List(Value("float32"))}


@dataclass(frozen=True)
class TokenSettings:
    """How rows become tokens; shared by all worker processes."""

    chat_format: ChatFormat
    max_length: int
    truncation: Truncation


# ---- reading ------------------------------------------------------------------------------------


@dataclass
class _Surveyed:
    """Results of the first reading for a batch of rows of one file."""

    num_rows: int
    valid: list[int]  # indices of the valid rows in the batch
    content: list[int]  # digests of the valid rows
    prompt: list[int]
    rejected: list[RejectedRow]
    has_weights: bool


def _survey(_: TokenSettings, reader: RowReader, raw: list[RawRow]) -> _Surveyed:
    result = _Surveyed(len(raw), [], [], [], [], False)
    for i, row in enumerate(map(reject_untrainable, map(reader.read, raw))):
        if isinstance(row, RejectedRow):
            result.rejected.append(row)
            continue
        content, prompt = digests(row)
        result.valid.append(i)
        result.content.append(content)
        result.prompt.append(prompt)
        turns = (m for m in row.messages if m["role"] == "assistant")
        result.has_weights |= any(turn.get("weight", 1.0) not in (0.0, 1.0) for turn in turns)
    return result


def row_batches(reader: RowReader, wanted: np.ndarray | None = None) -> Iterator[tuple[RowReader, list[RawRow]]]:
    """Batches of the rows of a file, one for each task; with `wanted` (bool), only of the rows that it marks."""
    rows: list[RawRow] = []
    characters = 0
    for i, row in enumerate(read_rows(reader.path)):
        if wanted is not None and (i >= len(wanted) or not wanted[i]):
            continue
        rows.append(row)
        characters += len(row.text)
        if len(rows) >= ROWS_PER_TASK or characters >= CHARACTERS_PER_TASK:
            yield reader, rows
            rows, characters = [], 0
    if rows:
        yield reader, rows


def survey(
    files: list[DataFile], readers: list[RowReader], pool: WorkerPool, rejected: RejectionLog, progress: bool
) -> Catalog:
    """Reads and validates all files; returns their valid rows, adds the others to `rejected`."""
    file, ordinal, content, prompt = [], [], [], []
    rows_read = [0] * len(files)
    has_weights = False
    index_of = {reader.path: i for i, reader in enumerate(readers)}
    tasks = (task for reader in readers for task in row_batches(reader))
    with tqdm(desc=f"Reading {len(files)} files", unit="row", disable=not progress) as bar:
        for (reader, _), found in pool.map(_survey, tasks):
            index = index_of[reader.path]
            file.append(np.full(len(found.valid), index, dtype=np.int32))
            ordinal.append(np.array(found.valid, dtype=np.int64) + rows_read[index])
            content.append(np.array(found.content, dtype=np.uint64))
            prompt.append(np.array(found.prompt, dtype=np.uint64))
            rejected.add(found.rejected)
            rows_read[index] += found.num_rows
            has_weights |= found.has_weights
            bar.update(found.num_rows)
    columns = (np.concatenate(column) for column in (file, ordinal, content, prompt))
    return Catalog(files, *columns, rows_read=rows_read, has_weights=has_weights)


# ---- tokenizing ---------------------------------------------------------------------------------


@dataclass
class RowStatistics:
    """Statistics of a batch of rows of one file, of which [K] are kept."""

    length: np.ndarray  # int32 [K], tokens
    supervised: np.ndarray  # int32 [K], tokens
    line: np.ndarray  # int64 [K]
    truncated: int  # rows
    control_text: int  # rows with control tokens in their own text
    remarks: Counter[str]  # see dft.chat.remarks
    channel: np.ndarray  # str [K], what their own field `channel` names, "" for none


@dataclass
class Tokenized:
    """The kept rows as arrays of all their tokens, [S]."""

    input_ids: np.ndarray  # int32 [S]
    labels: np.ndarray  # int32 [S]
    weights: np.ndarray | None  # float32 [S]; None: 1 everywhere
    place: np.ndarray  # int64 [K], indices of the kept rows in the batch
    rows: RowStatistics
    rejected: list[RejectedRow]


def tokenize_conversations(
    conversations: list[Conversation], chat_format: ChatFormat, max_length: int, truncation: Truncation = "right"
) -> list[Example | RejectedRow]:
    """Tokenizes, labels and truncates conversations; for each, its tokens or why it has none.

    Args:
        max_length: in tokens.
        truncation: what longer rows lose; with error they are rejected as too_long, as with drop.
    """
    results: list[Example | RejectedRow] = []
    encoded = chat_format.encode_batch([(row.messages, row.tools, row.template_kwargs) for row in conversations])
    for row, example in zip(conversations, encoded, strict=True):
        try:
            if isinstance(example, RowError):
                raise example
            results.append(truncate(example, max_length, "drop" if truncation == "error" else truncation))
        except RowError as error:
            results.append(reject(row, error.reason, error.detail))
    return results


def _tokenize(settings: TokenSettings, reader: RowReader, raw: list[RawRow]) -> Tokenized:
    rows = [reader.read(row) for row in raw]
    if any(isinstance(row, RejectedRow) for row in rows):
        raise UserError(f"{reader.path} was changed while it was being read")
    results = tokenize_conversations(rows, settings.chat_format, settings.max_length, settings.truncation)
    return stack_examples(results, rows)


def stack_examples(results: list[Example | RejectedRow], rows: list[Conversation]) -> Tokenized:
    """Examples and their statistics as arrays.

    Args:
        results: for each of the rows, its tokens or why it has none.
    """
    places = [i for i, row in enumerate(results) if isinstance(row, Example)]
    examples = [results[i] for i in places]
    weights = None
    if any(row.loss_weights is not None for row in examples):
        weights = _concatenate(
            [
                np.ones(len(row.labels), np.float32) if row.loss_weights is None else row.loss_weights
                for row in examples
            ]
        )
    statistics = RowStatistics(
        length=np.array([len(row.input_ids) for row in examples], dtype=np.int32),
        supervised=np.array([row.num_supervised for row in examples], dtype=np.int32),
        line=np.array([rows[i].line for i in places], dtype=np.int64),
        truncated=sum(row.is_truncated for row in examples),
        control_text=sum(row.has_control_text for row in examples),
        remarks=Counter(name for row in examples for name in row.remarks),
        channel=np.array([rows[i].channel for i in places], dtype=str),
    )
    return Tokenized(
        input_ids=_concatenate([row.input_ids for row in examples]),
        labels=_concatenate([row.labels for row in examples]),
        weights=weights,
        place=np.array(places, dtype=np.int64),
        rows=statistics,
        rejected=[row for row in results if isinstance(row, RejectedRow)],
    )


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)


def tokenize_files(
    catalog: Catalog,
    chosen: np.ndarray,
    readers: list[RowReader],
    pool: WorkerPool,
    rejected: RejectionLog,
    path: Path,
    progress: bool,
) -> tuple[list[RowStatistics], np.ndarray]:
    """Tokenizes the rows `chosen` (bool [R]) of a catalog and writes them to an Arrow file.

    Rows that can't be trained on are added to `rejected`.

    Returns:
        for each file, what became of its rows; and the catalog's index of every
        row written, int64.
    """
    of_file: list[list[RowStatistics]] = [[] for _ in readers]
    written: list[np.ndarray] = []
    schema = features(catalog.has_weights).arrow_schema
    bar = tqdm(
        total=int(chosen.sum()), desc=f"Tokenizing ({pool.num_workers} processes)", unit="row", disable=not progress
    )
    with bar, pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for number, reader in enumerate(readers):
            rows = np.flatnonzero(chosen & (catalog.file == number))
            wanted = np.zeros(catalog.rows_read[number], dtype=bool)
            wanted[catalog.ordinal[rows]] = True
            done = 0
            for (_, raw), result in pool.map(_tokenize, row_batches(reader, wanted) if len(rows) else ()):
                stream.write_table(arrow_table(result, catalog.has_weights))
                written.append(rows[done + result.place])
                done += len(raw)
                of_file[number].append(result.rows)
                rejected.add(result.rejected)
                bar.update(len(raw))
            if done != len(rows):
                raise UserError(f"{reader.path} was changed while it was being read")
    return [merge(parts) for parts in of_file], np.concatenate(written) if written else np.zeros(0, np.int64)


def merge(parts: list[RowStatistics]) -> RowStatistics:
    """Concatenates the statistics of several batches of one file."""
    return RowStatistics(
        length=_concatenate([part.length for part in parts]),
        supervised=_concatenate([part.supervised for part in parts]),
        line=_concatenate([part.line for part in parts]),
        truncated=sum(part.truncated for part in parts),
        control_text=sum(part.control_text for part in parts),
        remarks=sum((part.remarks for part in parts), Counter()),
        channel=_concatenate([part.channel for part in parts]),
    )


def features(has_weights: bool) -> Features:
    """The columns of a tokenized dataset."""
    return Features({**TOKENS, **(WEIGHTS if has_weights else {})})


def arrow_table(rows: Tokenized, has_weights: bool) -> pyarrow.Table:
    """Rows as an Arrow table with the columns of `features`."""
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(rows.rows.length)]), pyarrow.int32())
    columns = [rows.input_ids, rows.labels]
    if has_weights:
        columns.append(np.ones(len(rows.labels), np.float32) if rows.weights is None else rows.weights)
    schema = features(has_weights).arrow_schema
    arrays = [
        pyarrow.ListArray.from_arrays(offsets, column).cast(f.type) for column, f in zip(columns, schema, strict=True)
    ]
    return pyarrow.Table.from_arrays(arrays, schema=schema)
