"""The data report: counts for every file, notes on what was dropped, and sample rows to look at."""

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dft.chat.remarks import EMPTY_TURN, TURN_WITHOUT_THINKING, describe_remark
from dft.config.data import DataConfig
from dft.constants import IGNORE_INDEX
from dft.data.names import file_labels
from dft.data.rejection_log import DROPPED_ON_REQUEST
from dft.data.tables import aligned
from dft.printable import printable
from dft.reading.discovery import DataFile

PERCENTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
COLUMNS_OF_REMARKS = {TURN_WITHOUT_THINKING: "thinking lost", EMPTY_TURN: "empty turns"}  # where there are any
MANY_DROPPED = 0.1  # share of a file's rows above which their loss is a warning
SHOWN_REASONS = 3
SHOWN_CHARACTERS = 1000  # of the beginning and of the end of a long part of a sample row
GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


@dataclass
class FileStatistics:
    """Counts for the rows of one file."""

    path: str
    format: str
    rows_read: int
    not_sampled: int
    duplicates: int
    leaked: int
    rejected: Counter[str]  # reason -> rows
    lengths: np.ndarray  # int32, tokens of the rows kept
    supervised: int  # tokens
    truncated: int
    control_text: int
    remarks: Counter[str]  # see dft.chat.remarks


@dataclass
class SampleRow:
    """A tokenized row to look at, and where it comes from."""

    path: str
    line: int
    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]


# ---- counting -----------------------------------------------------------------------------------


def make_report(files: list[FileStatistics]) -> dict[str, Any]:
    """The report: {"files": [one entry for each file], "total": the same over all files}.

    An entry holds path, format, rows_read, kept, not_sampled, rejected {reason: count}, duplicates, leaked,
    tokens, supervised_tokens, truncated and control_tokens_in_text (rows), remarks {name: count}, see
    dft.chat.remarks, and length_percentiles (tokens).
    """
    total = FileStatistics(
        path="total",
        format="",
        rows_read=sum(file.rows_read for file in files),
        not_sampled=sum(file.not_sampled for file in files),
        duplicates=sum(file.duplicates for file in files),
        leaked=sum(file.leaked for file in files),
        rejected=sum((file.rejected for file in files), Counter()),
        lengths=np.concatenate([file.lengths for file in files]),
        supervised=sum(file.supervised for file in files),
        truncated=sum(file.truncated for file in files),
        control_text=sum(file.control_text for file in files),
        remarks=sum((file.remarks for file in files), Counter()),
    )
    return {"files": [_entry(file) for file in files], "total": _entry(total)}


def _entry(file: FileStatistics) -> dict[str, Any]:
    kept = len(file.lengths)
    accounted = kept + file.rejected.total() + file.not_sampled
    assert file.rows_read == accounted, f"{file.path}: {file.rows_read} rows read, {accounted} accounted for"
    return {
        "path": file.path,
        "format": file.format,
        "rows_read": file.rows_read,
        "kept": kept,
        "not_sampled": file.not_sampled,
        "rejected": dict(file.rejected.most_common()),
        "duplicates": file.duplicates,
        "leaked": file.leaked,
        "tokens": int(file.lengths.sum()),
        "supervised_tokens": file.supervised,
        "truncated": file.truncated,
        "control_tokens_in_text": file.control_text,
        "remarks": dict(file.remarks.most_common()),
        "length_percentiles": {n: int(np.percentile(file.lengths, q)) for n, q in PERCENTILES.items()} if kept else {},
    }


def describe_mix(
    config: DataConfig, files: list[DataFile], file: np.ndarray, order: np.ndarray | None
) -> list[dict[str, Any]]:
    """The entries of --data_files with their ratios, and how often their rows are seen in an epoch, on average.

    Args:
        file: the file of each training row, int32 [N].
        order: the rows of an epoch, see dft.data.selection.mix.
    """
    entry_of_row = np.array([-1 if f.entry is None else f.entry for f in files])[file]
    drawn = entry_of_row if order is None else entry_of_row[order]
    return [
        {
            "data_files": entry,
            "ratio": ratio,
            "by": config.mix_by,
            "times_seen": int((drawn == i).sum()) / max(1, int((entry_of_row == i).sum())),
        }
        for i, (entry, ratio) in enumerate(zip(config.data_files, config.mix_ratios, strict=True))
    ]


# ---- writing ------------------------------------------------------------------------------------


def write_report(report: dict[str, Any], directory: Path) -> None:
    """Writes data_report.json."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (directory / "data_report.json").write_text(text + "\n", encoding="utf-8")


def report_cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report as a table for people: a header, and a line for each file and for all of them."""
    names = ("file", "format", "rows", "kept", "dropped", "duplicates", "tokens", "supervised")
    remarks = {name: title for name, title in COLUMNS_OF_REMARKS.items() if report["total"]["remarks"].get(name)}
    lines = [(*names, "p50", "p95", "max", "truncated", "padding", *remarks.values())]
    files = report["files"]
    names_of_files = file_labels([entry["path"] for entry in files])
    entries = [*files, report["total"]] if len(files) > 1 else files
    for name, entry in zip([*names_of_files, "total"], entries, strict=False):
        lengths, waste = entry["length_percentiles"], entry.get("padding_waste")
        lines.append(
            (
                name,
                entry["format"],
                f"{entry['rows_read']:,}",
                f"{entry['kept']:,}",
                f"{sum(entry['rejected'].values()):,}",
                f"{entry['duplicates']:,}",
                f"{entry['tokens']:,}",
                f"{entry['supervised_tokens'] / max(entry['tokens'], 1):.0%}",
                *(f"{lengths[key]:,}" if lengths else "-" for key in ("p50", "p95", "max")),
                f"{entry['truncated']:,}",
                "-" if waste is None else f"{waste:.0%}",
                *(f"{entry['remarks'].get(remark, 0):,}" for remark in remarks),
            )
        )
    return lines


def report_notes(report: dict[str, Any]) -> list[str]:
    """Remarks in sentences, for what the table doesn't show."""
    total = report["total"]
    notes = []
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in total["rejected"].items())
    if dropped:
        notes.append(f"dropped: {dropped}; see rejected.jsonl")
    if total["not_sampled"]:
        notes.append(f"left out by sampling: {total['not_sampled']:,} rows")
    if total["duplicates"] and "duplicate" not in total["rejected"]:
        notes.append(f"{total['duplicates']:,} rows repeat an earlier one: --dedup True drops them")
    if total["leaked"] and "leaked" not in total["rejected"]:
        notes.append(
            f"{total['leaked']:,} training rows have the prompt of an evaluation row, so the evaluation looks better "
            "than it is: --drop_leaked True drops them"
        )
    if total["control_tokens_in_text"]:
        notes.append(
            f"control tokens stand in the text of {total['control_tokens_in_text']:,} rows: kept as plain text"
        )
    if "mix" in report:
        parts = [f"{printable(e['data_files'])} {e['ratio']:g} (×{e['times_seen']:.3g})" for e in report["mix"]]
        notes.append(f"mixed by {report['mix'][0]['by']}, and how often rows are seen: {', '.join(parts)}")
    notes += [describe_remark(name, count) for name, count in total["remarks"].items()]
    if "steps_per_epoch" in total:
        batches = total["batching"].replace("_", "-")
        if "bins" in total:
            batches += f" into {total['bins']:,} of {total['bin_tokens']:,} tokens, {total['bin_fill']:.1%} full"
        if total["batching"] == "padded":
            batches += f" ({total['padding_share']:.0%} padding)"
        notes.append(
            f"{total['training_rows_per_epoch']:,} training rows, {batches}, "
            f"{total['steps_per_epoch']:,} steps an epoch"
        )
    return notes + stage_notes(report)


def stage_notes(report: dict[str, Any]) -> list[str]:
    """A sentence for each stage, if there are any."""
    notes, first = [], 1
    for number, stage in enumerate(report.get("stages", []), start=1):
        seen = ", ".join(f"{printable(n)} ×{source['times_seen']:.3g}" for n, source in stage["sources"].items())
        factor, limit = stage["learning_rate_factor"], stage["max_length"]
        notes.append(
            f"stage {number}, {stage['name']}: steps {first:,} to {first + stage['steps'] - 1:,}, {stage['rows']:,} "
            f"rows, {stage['tokens']:,} tokens, of sources and how often they are seen: {seen}"
            + ("" if limit is None else f"; rows of at most {limit:,} tokens")
            + ("" if factor == 1 else f"; learning rate ×{factor:g}")
        )
        first += stage["steps"]
    return notes


def report_warnings(report: dict[str, Any]) -> list[str]:
    """What is wrong with files that lose many rows, not counting those that are dropped on request."""
    warnings = []
    for entry in report["files"]:
        reasons = {reason: n for reason, n in entry["rejected"].items() if reason not in DROPPED_ON_REQUEST}
        dropped, read = sum(reasons.values()), entry["rows_read"]
        if dropped > read * MANY_DROPPED:
            commonest = sorted(reasons.items(), key=lambda item: -item[1])[:SHOWN_REASONS]
            words = ", ".join(f"{n:,} {reason}" for reason, n in commonest)
            more = ", and others" if len(reasons) > SHOWN_REASONS else ""
            warnings.append(
                f"{printable(entry['path'])}: {dropped:,} of {read:,} rows ({dropped / read:.0%}) are dropped: {words}"
                f"{more}; see rejected.jsonl"
            )
    return warnings


def report_table(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n".join(aligned(report_cells(report), num_left=2) + report_notes(report))


# ---- sample rows --------------------------------------------------------------------------------


def runs(row: SampleRow, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The decoded text of a row, cut into runs of tokens that are all supervised or all not."""
    supervised = row.labels != IGNORE_INDEX
    borders = np.flatnonzero(np.diff(supervised)) + 1
    parts = zip(np.split(row.input_ids, borders), np.split(supervised, borders), strict=True)
    return [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), bool(flags[0])) for ids, flags in parts]


def show_row(row: SampleRow, tokenizer: PreTrainedTokenizerBase, color: bool | None = None) -> str:
    """The text of a row with what is supervised in green and the rest gray, or between [[ and ]] without color.

    Long parts are cut in the middle, so that one row doesn't fill the terminal.

    Args:
        color: None for color where stdout is a terminal and NO_COLOR is not set.
    """
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") if color is None else color
    marks = ((GRAY, PLAIN), (GREEN, PLAIN)) if color else (("", ""), ("[[", "]]"))
    text = ""
    for part, is_supervised in runs(row, tokenizer):
        before, after = marks[is_supervised]
        text += before + _shortened(printable(part, lines=True)) + after
    return f"{printable(row.path)}:{row.line}\n{text}"


def _shortened(text: str) -> str:
    """The text with its beginning and its end alone, if it is long."""
    left_out = len(text) - 2 * SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:SHOWN_CHARACTERS]} … {left_out:,} characters … {text[-SHOWN_CHARACTERS:]}"
