"""The command clean: each row is judged by itself, by the rules that are asked for."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from dft.errors import UserError
from dft.reading.rows import Conversation
from dft.selection.method import KEPT, Command, Decide, Decision, Verdict


@dataclass(frozen=True)
class CleanConfig:
    """Rules of clean; None leaves a rule out."""

    min_characters: int | None = None
    max_characters: int | None = None

    def __post_init__(self):
        if (self.min_characters or 0) < 0 or (self.max_characters is not None and self.max_characters < 1):
            raise UserError("--min_characters must be at least 0, and --max_characters at least 1")


def clean(config: CleanConfig) -> Decide:
    """The method of these rules."""

    def decide(rows: Iterator[Conversation]) -> Decision:
        verdicts, lengths = [], []
        for row in rows:
            lengths.append(sum(len(message["content"]) for message in row.messages))
            verdicts.append(_judge(lengths[-1], config))
        return Decision(verdicts, {"characters": lengths})

    return decide


def _judge(length: int, config: CleanConfig) -> Verdict:
    if config.min_characters is not None and length < config.min_characters:
        return Verdict("too_short", f"{length} characters, fewer than {config.min_characters}", length)
    if config.max_characters is not None and length > config.max_characters:
        return Verdict("too_long", f"{length} characters, more than {config.max_characters}", length)
    return KEPT


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min_characters", type=int, help="of all messages together")
    parser.add_argument("--max_characters", type=int, help="of all messages together")


def _method(args: argparse.Namespace) -> Decide:
    return clean(CleanConfig(args.min_characters, args.max_characters))


COMMAND = Command("clean", "drop rows by rules on each of them", __doc__, _add_arguments, _method)
