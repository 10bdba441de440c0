"""What became of the data: counts for every file, the rows that were dropped, and sample rows to look at."""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chat_format import Example
from data_files import Rejected
from dft_loss import IGNORE_INDEX

PERCENTILES = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


@dataclass
class TokenizedRow:
    """One row kept, and where it comes from."""

    path: str
    line: int
    example: Example


def make_report(rows_read: Counter[str], rows: list[TokenizedRow], rejected: list[Rejected]) -> dict[str, Any]:
    """What became of every row: {"files": [one entry for each file], "total": the same over all files}.

    An entry holds path, format, rows_read, kept, rejected {reason: count}, tokens, supervised_tokens,
    truncated and control_tokens_in_text (rows), not_rendered {column: rows whose chat template never shows
    it}, and length_percentiles (tokens).
    """
    kept_of: dict[str, list[TokenizedRow]] = {path: [] for path in rows_read}
    rejected_of: dict[str, list[Rejected]] = {path: [] for path in rows_read}
    for row in rows:
        kept_of[row.path].append(row)
    for row in rejected:
        rejected_of[row.path].append(row)
    files = [_entry(path, n, kept_of[path], rejected_of[path]) for path, n in rows_read.items()]
    return {"files": files, "total": _entry("total", rows_read.total(), rows, rejected)}


def _entry(path: str, rows_read: int, rows: list[TokenizedRow], rejected: list[Rejected]) -> dict[str, Any]:
    assert rows_read == len(rows) + len(rejected), f"{path}: rows were lost between reading and tokenising"
    lengths = [len(row.example.input_ids) for row in rows]
    return {
        "path": path,
        "format": "messages",
        "rows_read": rows_read,
        "kept": len(rows),
        "rejected": dict(Counter(r.reason for r in rejected).most_common()),
        "tokens": sum(lengths),
        "supervised_tokens": sum(row.example.num_supervised for row in rows),
        "truncated": sum(row.example.is_truncated for row in rows),
        "control_tokens_in_text": sum(row.example.has_control_text for row in rows),
        "not_rendered": dict(Counter(name for row in rows for name in row.example.not_rendered)),
        "length_percentiles": {n: int(np.percentile(lengths, q)) for n, q in PERCENTILES.items()} if lengths else {},
    }


def write_report(report: dict[str, Any], rejected: list[Rejected], directory: Path) -> None:
    """Writes data_report.json, and rejected.jsonl with every dropped row whole."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (directory / "data_report.json").write_text(text + "\n", encoding="utf-8")
    with open(directory / "rejected.jsonl", "w", encoding="utf-8") as file:
        for row in rejected:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def report_table(report: dict[str, Any]) -> str:
    """The report as a table for people, one line for each file."""
    header = ("file", "rows", "kept", "dropped", "tokens", "supervised", "p50", "p95", "max", "truncated")
    lines = [header]
    files = report["files"]
    for entry in [*files, report["total"]] if len(files) > 1 else files:
        lengths = entry["length_percentiles"]
        lines.append(
            (
                Path(entry["path"]).name,
                f"{entry['rows_read']:,}",
                f"{entry['kept']:,}",
                f"{entry['rows_read'] - entry['kept']:,}",
                f"{entry['tokens']:,}",
                f"{entry['supervised_tokens'] / max(entry['tokens'], 1):.0%}",
                *(f"{lengths[key]:,}" if lengths else "-" for key in ("p50", "p95", "max")),
                f"{entry['truncated']:,}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = []
    for name, *numbers in lines:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))]
        table.append("  ".join(cells))
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in report["total"]["rejected"].items())
    if dropped:
        table.append(f"dropped: {dropped}; see rejected.jsonl")
    spoofed = report["total"]["control_tokens_in_text"]
    if spoofed:
        table.append(f"control tokens stand in the text of {spoofed:,} rows: kept as plain text")
    for column, count in report["total"]["not_rendered"].items():
        table.append(f"the chat template never shows {column!r}, which {count:,} rows have: nothing of it is learnt")
    return "\n".join(table)


def show_row(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase, color: bool | None = None) -> str:
    """The text of a row with what is supervised in green and the rest grey, or between [[ and ]] without colour.

    Args:
        color: None for colour where stdout is a terminal.
    """
    color = sys.stdout.isatty() if color is None else color
    marks = ((GREY, PLAIN), (GREEN, PLAIN)) if color else (("", ""), ("[[", "]]"))
    supervised = row.example.labels != IGNORE_INDEX
    borders = np.flatnonzero(np.diff(supervised)) + 1
    text = ""
    for ids, is_supervised in zip(
        np.split(row.example.input_ids, borders), np.split(supervised, borders), strict=True
    ):
        before, after = marks[int(is_supervised[0])]
        text += before + tokenizer.decode(ids, clean_up_tokenization_spaces=False) + after
    return f"{row.path}:{row.line}\n{text}"
