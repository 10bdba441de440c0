"""Write question-and-answer rows of a public data set as chats: JSON lines of messages, which --data_files takes.

    python scripts/prepare_pairs.py NuminaMath-CoT/data/ --question problem --answer solution --limit 100000 \\
        --output data/numinamath.jsonl
    python scripts/prepare_pairs.py gsm8k/main/train-*.parquet --question question --answer answer \\
        --prompt_suffix ' Give the answer behind ####.' --output data/gsm8k.jsonl

Reads .jsonl, .json, .gz, .zst and .parquet. Rows whose columns the trainer knows (messages, conversations,
instruction and output, prompt and completion) need none of this: see docs/data.md. Texts are kept word for word.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.program import program
from dft.reading.discovery import find_data_files
from dft.reading.formats import parse
from dft.reading.raw_rows import read_rows
from dft.reading.rows import RowError, malformed
from dft.reading.strict_json import RepeatedKey, kind

SHOWN = 20  # bad rows that the message lists
EMPTY = "empty"  # the reason of a row whose question or answer says nothing


@dataclass(frozen=True)
class Pairs:
    """How a row becomes a chat; the flags of this program.

    Args:
        question, answer, channel: names of columns; channel "" for none.
        system: of every chat, "" for none.
        suffix: follows every question.
    """

    question: str
    answer: str
    channel: str = ""
    system: str = ""
    suffix: str = ""

    def chat(self, row: Any) -> dict[str, Any]:
        """The row of messages.

        Raises:
            RowError: a column is missing or not a text, or says nothing.
        """
        if not isinstance(row, dict):
            raise malformed(f"a row must be an object, not {kind(row)}")
        question, answer = self._text(row, self.question), self._text(row, self.answer)
        messages = [
            *([{"role": "system", "content": self.system}] if self.system else []),
            {"role": "user", "content": question + self.suffix},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, **({"channel": self._text(row, self.channel)} if self.channel else {})}

    def _text(self, row: dict[str, Any], column: str) -> str:
        if column not in row:
            raise malformed(f"no {column!r} (found {', '.join(map(repr, row)) or 'nothing'})")
        if isinstance(row, RepeatedKey) and column in row.repeated:
            raise malformed(f"the key {column!r} stands twice in the row")
        text = row[column]
        if not isinstance(text, str):
            raise malformed(f"{column!r} must be text, not {kind(text)}")
        if not text.strip():
            raise RowError(EMPTY, f"{column!r} is empty")
        return text


@dataclass
class Counts:
    """What became of the rows that were read."""

    written: int = 0
    empty: int = 0
    bad: int = 0
    has_empty: bool = False  # among the bad ones
    problems: list[str] = field(default_factory=list)  # of the first bad rows, with their places

    def add_bad(self, path: str, line: int, error: RowError) -> None:
        self.bad += 1
        self.has_empty |= error.reason == EMPTY
        if self.bad <= SHOWN:
            self.problems.append(f"  {printable(path)}:{line}: {error.detail}")


def main(argv: list[str] | None = None) -> None:
    """Writes the chats, and prints how many.

    Raises:
        UserError: a flag outside its range, files that can't be read or written, or bad rows.
    """
    args = parse_flags(argv)
    pairs = Pairs(args.question, args.answer, args.channel or "", args.system or "", args.prompt_suffix or "")
    found = find_data_files(args.files, "files")
    if any(file.max_rows is not None for file in found):
        raise UserError("PATH#N is a random sample, which is not drawn here: take the first rows with --limit")
    files = [file.path for file in found]
    if args.output.exists() and not args.overwrite:
        raise UserError(f"--output {printable(args.output)} exists: give another file, or replace it with --overwrite")
    if any(os.path.realpath(path) == os.path.realpath(args.output) for path in files):
        raise UserError(f"--output {printable(args.output)} is read: give another file")
    counts = Counts()
    rows = chats(files, pairs, counts, skips_empty=args.skip_empty)
    write(rows, args.output, args.limit, counts)
    empty = f"; {counts.empty:,} were left out because their question or answer is empty" if counts.empty else ""
    print(f"{printable(args.output)}: {counts.written:,} chats of {len(files):,} files{empty}")


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        UserError: a flag outside its range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", help="files, directories and globs, read in this order")
    parser.add_argument("--question", required=True, help="name of the column with the question")
    parser.add_argument("--answer", required=True, help="name of the column with the answer")
    parser.add_argument("--output", type=path_argument, required=True, help="file of JSON lines to write")
    parser.add_argument("--system", help="system prompt of every chat")
    parser.add_argument("--prompt_suffix", help="text that follows every question, its leading space included")
    parser.add_argument("--channel", help="name of the column with the source of a row, for metrics of its own")
    parser.add_argument("--limit", type=int, help="write the first so many chats; by default all")
    parser.add_argument("--skip_empty", action="store_true", help="leave out rows whose question or answer is empty")
    parser.add_argument("--overwrite", action="store_true", help="replace the output, if it exists")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it must be at least 1")
    if args.question == args.answer:
        raise UserError(f"--question and --answer are both {args.question}: name two columns")
    return args


def chats(files: list[str], pairs: Pairs, counts: Counts, *, skips_empty: bool) -> Iterator[dict[str, Any]]:
    """The chats of all files in order; bad rows are counted and left out."""
    for path, raw in chain.from_iterable(((path, raw) for raw in read_rows(path)) for path in files):
        try:
            yield pairs.chat(parse(raw))
        except RowError as error:
            if error.reason == EMPTY and skips_empty:
                counts.empty += 1
            else:
                counts.add_bad(path, raw.line, error)


def write(rows: Iterator[dict[str, Any]], path: Path, limit: int | None, counts: Counts) -> None:
    """Writes the rows beside the file, which takes its name when all is well.

    Raises:
        UserError: there were bad rows or none at all, or it can't be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts.written += 1
                if counts.written == limit:
                    break
        check(counts)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"--output {printable(path)} can't be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check(counts: Counts) -> None:
    """Raises UserError where rows were bad, or where there is nothing to train on."""
    if counts.bad:
        more = f"\n  and {counts.bad - SHOWN:,} more" if counts.bad > SHOWN else ""
        hint = "\n--skip_empty leaves out those that are empty." if counts.has_empty else ""
        raise UserError(f"{counts.bad:,} rows are no pairs:\n" + "\n".join(counts.problems) + more + hint)
    if not counts.written:
        raise UserError("no row is left to write")


if __name__ == "__main__":
    with program():
        main()
