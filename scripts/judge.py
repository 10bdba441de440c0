"""Judge answers by a language model behind any endpoint of the OpenAI protocol, with a rubric.

    python scripts/judge.py score answers.jsonl --model qwen3-32b --endpoint http://127.0.0.1:8000/v1
    OPENAI_API_KEY=… python scripts/judge.py compare a.jsonl b.jsonl --model gpt-5 --output judged.jsonl

A row of answers has the keys prompt (a text, or messages) and answer, and may have reference and channel.
"""

import argparse

from dft.files import path_argument
from dft.judging import run
from dft.judging.flags import add_arguments
from dft.program import program
from dist_logger import setup_logging


def main(argv: list[str] | None = None) -> None:
    """Runs one command, and prints its numbers.

    Raises:
        UserError: a flag, a file or the server can't be used.
        StoppedEarly: the server has gone, or too many requests have failed.
    """
    args = parse(argv)
    setup_logging()
    args.command(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of a command line."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    own = commands.add_parser("score", help="rubric scores of the answers of a file", **form)
    own.add_argument("answers", type=path_argument, help="file of JSON lines with prompt and answer")
    own.set_defaults(command=run.score)
    add_arguments(own)
    own = commands.add_parser("compare", help="win rate of one model over another", **form)
    own.add_argument("answers_a", type=path_argument, help="file of JSON lines with prompt and answer")
    own.add_argument("answers_b", type=path_argument, help="the other model's answers to the same prompts")
    own.set_defaults(command=run.compare)
    add_arguments(own)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with program():
        main()
