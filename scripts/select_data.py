"""Select training rows: kept word for word, or dropped with a reason, and a report of both.

    python scripts/select_data.py clean --data_files data/ --output cleaned --min_characters 50
    bash scripts/train.sh --data_files cleaned/kept

The output directory gets kept/, a file of JSON lines for each file that is read; dropped.jsonl, every other row with
its reason; and selection_report.json and .html, with counts, scores and examples.
"""

import argparse

from dft.printable import printable
from dft.program import program
from dft.selection import clean, contamination, diversity, ifd, ifd_seed, mods, near_duplicates, quality
from dft.selection.run import add_common_arguments, run
from dist_logger import setup_logging

METHODS = (clean, near_duplicates, contamination, ifd_seed, ifd, quality, diversity, mods)
COMMANDS = {method.COMMAND.name: method.COMMAND for method in METHODS}


def main(argv: list[str] | None = None) -> None:
    """Runs one command, and prints its counts and where its files are.

    Raises:
        UserError: a flag, a file or the output can't be used.
    """
    args = parse(argv)
    setup_logging()
    summary = run(COMMANDS[args.command], args)
    if summary:  # of the first process
        print(printable(summary, lines=True))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        own = commands.add_parser(command.name, help=command.help, description=command.description, **form)
        add_common_arguments(own)
        command.add_arguments(own)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with program():
        main()
