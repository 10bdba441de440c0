"""One selection, from the files to the output directory."""

import argparse
import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

from dft.config.data import FORMATS, parse_role_map
from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.program import rank_and_world_size
from dft.selection.inputs import InputFile, find_inputs, read_inputs
from dft.selection.method import Command, Decide, Decision
from dft.selection.outputs import PAGE, REPORT, check_output, names_below, published
from dft.selection.page import page
from dft.selection.report import make_report, table
from dft.selection.writing import RowWriter


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every command has."""
    parser.add_argument("--data_files", nargs="+", required=True, help="files, directories, globs to select from")
    parser.add_argument("--data_format", choices=("auto", *FORMATS), default="auto", help="by default told by columns")
    parser.add_argument("--role_map", nargs="+", default=[], metavar="NAME=ROLE", help="other names of roles")
    parser.add_argument("--output", type=path_argument, required=True, help="directory to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier selection in that directory")


def run(command: Command, args: argparse.Namespace) -> str:
    """Selects, writes the output directory, and returns what to print. The first process of a launcher writes.

    Raises:
        UserError: a flag, a file or the output can't be used, or no row is valid. Nothing is written then.
    """
    role_map = parse_role_map(args.role_map)
    decide = command.method(args)
    files = find_inputs(args.data_files)
    others = [file for flag in command.also_read for file in _named(args, flag)]
    check_output(args.output, files + others, args.overwrite)
    decision = _decide(decide, files, args.data_format, role_map)
    if rank_and_world_size()[0] > 0:
        return ""
    report = _write(command, args, files, decision)
    lines = [table(report), f"kept rows: {printable(args.output)}/kept", f"report: {printable(args.output)}/{PAGE}"]
    return "\n".join(lines)


def _named(args: argparse.Namespace, flag: str) -> list[InputFile]:
    return find_inputs(getattr(args, flag), flag) if getattr(args, flag) else []


def _decide(decide: Decide, files: list[InputFile], data_format: str, role_map: dict[str, str]) -> Decision:
    valid = read_inputs(files, data_format, role_map)
    first_row = next(valid, None)
    if first_row is None:
        file = next(file for file in files if file.dropped)
        first = next(iter(file.dropped.values()))
        raise UserError(
            f"no row of --data_files can be trained on, the first because: {printable(file.path)}: {first.detail}"
        )
    decision = decide(chain([first_row], valid))
    rows = sum(file.rows_read - len(file.dropped) for file in files)
    assert len(decision.verdicts) == rows, f"{len(decision.verdicts)} verdicts for {rows} rows"
    if all(verdict.reason for verdict in decision.verdicts):
        decision.notes.append("No row is left: loosen the settings.")
    return decision


def _write(command: Command, args: argparse.Namespace, files: list[InputFile], decision: Decision) -> dict[str, Any]:
    """Writes the directory; returns the report."""
    settings = {name: _plain(value) for name, value in vars(args).items() if name != "command"}
    with published(args.output) as directory:
        writer = RowWriter(iter(decision.verdicts), directory)
        report = make_report(command.name, settings, writer.write(files), decision)
        for name, objects in decision.tables.items():
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
            _write_text(directory / name, "".join(lines))
        _write_text(directory / PAGE, page(report, decision, writer.examples))
        written = sorted({REPORT, *names_below(directory)})
        _write_text(directory / REPORT, json.dumps({**report, "written": written}, indent=1) + "\n")
    return report


def _plain(value: Any) -> Any:
    """A value that JSON has: infinite numbers become texts."""
    is_plain = not isinstance(value, Path) and not (isinstance(value, float) and not math.isfinite(value))
    return value if is_plain else str(value)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
