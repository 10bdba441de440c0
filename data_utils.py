"""Many chat files to one tokenised dataset: read, validate, merge, split, tokenise, report.

    conversations, rejected, rows_read = load_conversations(find_data_files(["data/"], "data_files"))
    rows, more_rejected = tokenize_conversations(conversations, ChatFormat(tokenizer), max_length=8192)

Only token arrays go into the `datasets` library. Per file, rows read = rows kept + rows rejected.
"""

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from tqdm.auto import tqdm

from chat_format import ChatFormat, Example, RowRejected, truncate
from data_files import Conversation, Rejected, find_data_files, read_rows
from data_report import TokenizedRow, make_report
from dist_logger import UserError, get_logger

logger = get_logger(__name__)

SHOWN_ERRORS = 20
ROWS_PER_TASK = 64
FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


@dataclass
class PreparedData:
    """The rows to train and to evaluate on, and those that are not."""

    train: list[TokenizedRow]
    held_out: list[TokenizedRow]  # for evaluation; may be empty
    rejected: list[Rejected]
    report: dict[str, Any]  # see data_report.make_report

    def to_dataset_dict(self) -> DatasetDict:
        """The tokenised rows as `train` and, where rows are held out, `eval`."""
        rows = {"train": self.train, "eval": self.held_out}
        return DatasetDict({name: to_dataset(some) for name, some in rows.items() if some})


# ---- reading ------------------------------------------------------------------------------------


def load_conversations(
    paths: list[str], progress: bool = True
) -> tuple[list[Conversation], list[Rejected], Counter[str]]:
    """Reads and validates files.

    Returns:
        the conversations, in order; the rows that are broken or have nothing to learn; and the number
        of rows read from each path.

    Raises:
        UserError: a file can't be opened.
    """
    conversations: list[Conversation] = []
    rejected: list[Rejected] = []
    rows_read: Counter[str] = Counter()
    for path in tqdm(paths, desc="Reading files", unit="file", disable=not progress):
        try:
            for row in read_rows(path):
                rows_read[path] += 1
                if isinstance(row, Rejected) and row.reason == "rest_of_file_unread":
                    logger.warning("%s", row)
                row = reject_untrainable(row)
                (rejected if isinstance(row, Rejected) else conversations).append(row)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from error
    return conversations, rejected, rows_read


def reject_untrainable(row: Conversation | Rejected) -> Conversation | Rejected:
    """`row` itself, or its rejection if the assistant says nothing in it."""
    if isinstance(row, Rejected):
        return row
    turns = [m for m in row.messages if m["role"] == "assistant"]
    if not turns:
        return reject(row, "no_assistant_turn", "no message of the role assistant")
    if not any(t["content"].strip() or t.get("tool_calls") or t.get("reasoning_content") for t in turns):
        return reject(row, "no_assistant_text", "every assistant message is empty")
    return row


def reject(row: Conversation, reason: str, detail: str) -> Rejected:
    """The rejection of a well-formed row that can't be trained on."""
    return Rejected(row.path, row.line, reason, detail, row.row, is_malformed=False)


def stop_on_rejected(rejected: list[Rejected], data_validation: str) -> None:
    """Raises UserError with the places of the rows that `data_validation` doesn't allow to drop.

    standard: malformed rows stop. strict: all do. lenient: none does.
    """
    if data_validation == "lenient":
        return
    bad = [r for r in rejected if r.is_malformed or data_validation == "strict"]
    if bad:
        lines = [str(r) for r in bad[:SHOWN_ERRORS]]
        if len(bad) > SHOWN_ERRORS:
            lines.append(f"… and {len(bad) - SHOWN_ERRORS} more")
        by_reason = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in bad).most_common())
        raise UserError(
            f"{len(bad)} rows can't be used ({by_reason}). Mend them, or drop them with --data_validation lenient.\n"
            + "\n".join(lines)
        )


# ---- tokenising ---------------------------------------------------------------------------------


def tokenize_conversations(
    conversations: list[Conversation],
    chat_format: ChatFormat,
    max_length: int,
    num_workers: int = 1,
    progress: bool = True,
) -> tuple[list[TokenizedRow], list[Rejected]]:
    """Tokenises, labels and truncates conversations, in at most `num_workers` processes.

    Returns:
        the rows kept, in order, none longer than `max_length` tokens; and the rows rejected.
    """
    chunks = [conversations[i : i + ROWS_PER_TASK] for i in range(0, len(conversations), ROWS_PER_TASK)]
    num_workers = max(1, min(num_workers, os.cpu_count() or 1, len(chunks)))
    bar = tqdm(
        total=len(conversations), desc=f"Tokenising ({num_workers} processes)", unit="row", disable=not progress
    )
    kept: list[TokenizedRow] = []
    rejected: list[Rejected] = []

    # forked workers inherit all they read: nothing but indices and arrays is pickled
    _SHARED.update(chat_format=chat_format, max_length=max_length, chunks=chunks)
    fork = multiprocessing.get_context("fork")
    with bar, ProcessPoolExecutor(num_workers, fork) if num_workers > 1 else nullcontext() as pool:
        run_all = pool.map if pool else map
        for chunk, examples in zip(chunks, run_all(_tokenize_chunk, range(len(chunks))), strict=True):
            for conversation, example in zip(chunk, examples, strict=True):
                if isinstance(example, Rejected):
                    rejected.append(example)
                else:
                    kept.append(TokenizedRow(conversation.path, conversation.line, example))
            bar.update(len(chunk))
    _SHARED.clear()
    return kept, rejected


_SHARED: dict[str, Any] = {}  # set just before the workers are forked


def _tokenize_chunk(index: int) -> list[Example | Rejected]:
    results: list[Example | Rejected] = []
    for row in _SHARED["chunks"][index]:
        try:
            example = _SHARED["chat_format"].encode(row.messages, row.tools, row.template_kwargs)
            results.append(truncate(example, _SHARED["max_length"]))
        except RowRejected as error:
            results.append(reject(row, error.reason, error.detail))
        except RecursionError:
            results.append(reject(row, "nested_too_deeply", "its tools or tool calls are nested too deeply"))
    return results


def to_dataset(rows: list[TokenizedRow]) -> Dataset:
    """The columns input_ids and labels of the rows, as int32 lists."""
    columns = {
        "input_ids": [row.example.input_ids for row in rows],
        "labels": [row.example.labels for row in rows],
    }
    return Dataset.from_dict(columns, features=FEATURES)


# ---- merging and splitting ----------------------------------------------------------------------


def sample_indices(num_rows: int, size: int, seed: int) -> np.ndarray:
    """`size` of the indices below `num_rows`, sorted; the same for the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:size])


def hold_out(
    rows: list[TokenizedRow], percentage: float, max_rows: int | None, seed: int
) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Splits rows into training and evaluation rows, each in their old order.

    Args:
        percentage: share held out; above 0, at least one row.
        max_rows: most rows held out, None or 0 for no limit; the others stay in training.

    Raises:
        UserError: nothing would be left to train on.
    """
    if percentage <= 0:
        return rows, []
    size = min(max(1, round(len(rows) * percentage / 100)), max_rows or len(rows))
    if size >= len(rows):
        raise UserError(
            f"{len(rows)} rows can't be split into training and evaluation: add data, or "
            "--validation_split_percentage 0"
        )
    chosen = set(sample_indices(len(rows), size, seed).tolist())
    return [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def prepare_data(
    data_files: list[str],
    eval_data_files: list[str] | None,
    chat_format: ChatFormat,
    *,
    max_length: int,
    validation_split_percentage: float,
    max_eval_samples: int | None,
    data_validation: str,
    num_workers: int,
    seed: int,
    progress: bool = True,
) -> PreparedData:
    """From paths to tokenised training and evaluation rows.

    Args:
        max_length: in tokens; longer rows lose their end.
        max_eval_samples: most evaluation rows, None or 0 for no limit.
        data_validation: what may be dropped, see `stop_on_rejected`.

    Raises:
        UserError: files are missing, rows are refused, or nothing is left to train or evaluate on.
    """
    train_paths = find_data_files(data_files, "data_files")
    eval_paths = find_data_files(eval_data_files, "eval_data_files") if eval_data_files else []
    for path in {Path(p).resolve() for p in train_paths} & {Path(p).resolve() for p in eval_paths}:
        logger.warning("%s is both training and evaluation data: the evaluation says nothing about new rows", path)
    paths = list(dict.fromkeys(train_paths + eval_paths))
    conversations, unread, rows_read = load_conversations(paths, progress)
    stop_on_rejected(unread, data_validation)
    rows, untokenized = tokenize_conversations(conversations, chat_format, max_length, num_workers, progress)
    stop_on_rejected(untokenized, data_validation)
    rejected = unread + untokenized

    train = _rows_of(train_paths, rows, rejected, "data_files")
    if eval_paths:
        held_out = _rows_of(eval_paths, rows, rejected, "eval_data_files")
        if max_eval_samples and len(held_out) > max_eval_samples:
            logger.info("Evaluating on %d of %d rows (--max_eval_samples)", max_eval_samples, len(held_out))
            held_out = [held_out[i] for i in sample_indices(len(held_out), max_eval_samples, seed)]
    else:
        train, held_out = hold_out(train, validation_split_percentage, max_eval_samples, seed)
    return PreparedData(train, held_out, rejected, make_report(rows_read, rows, rejected))


def _rows_of(paths: list[str], rows: list[TokenizedRow], rejected: list[Rejected], flag: str) -> list[TokenizedRow]:
    wanted = set(paths)
    chosen = [row for row in rows if row.path in wanted]
    if not chosen:
        reasons = Counter(r.reason for r in rejected if r.path in wanted)
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        first = next((f"\nthe first: {r}" for r in rejected if r.path in wanted), "")
        raise UserError(f"no row of --{flag} is left: {why or 'the files hold none'}{first}")
    return chosen
