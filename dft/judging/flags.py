"""The flags that scores and comparisons share, and the settings that they make."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dft.errors import UserError
from dft.files import check_writable, path_argument
from dft.judging.asking import Form, Poll
from dft.judging.costs import Prices
from dft.judging.endpoint import KEY, URL, EndpointConfig
from dft.judging.rubric import load_rubric
from dft.printable import printable


@dataclass(frozen=True)
class Settings:
    """How one command asks, and where its results go.

    Args:
        output: of the judged rows; None for none.
        report: of the numbers, as JSON; None for none.
        max_failed: share of the requests that may fail.
    """

    poll: Poll
    endpoint: EndpointConfig
    prices: Prices
    output: Path | None
    report: Path | None
    max_failed: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the judge, of the votes and of the output."""
    parser.add_argument("--model", required=True, help="the judge, as the server calls it")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help=f"what stands before /chat/completions, such as http://127.0.0.1:8000/v1; by default ${URL}, else the "
        f"openai client's own. The key is ${KEY}; servers without keys need none",
    )
    parser.add_argument("--rubric", type=path_argument, help="YAML file; by default dft/judging/rubric.yaml")
    parser.add_argument(
        "--output", type=path_argument, help="JSON lines of votes and results; its rows aren't asked again"
    )
    parser.add_argument("--report", type=path_argument, help="JSON file to write the numbers to")
    parser.add_argument("--votes", type=int, default=3, help="replies to each question, by default 3")
    parser.add_argument("--seed", type=int, default=0, help="of the first vote, by default 0; the others follow")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the replies, by default 1")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of a reply at most, by default 1024")
    parser.add_argument(
        "--request",
        type=_json_object,
        default={},
        metavar="JSON",
        help='further fields of each request; null leaves one out: \'{"seed": null, "top_p": 0.9}\'',
    )
    parser.add_argument("--workers", type=int, default=4, help="requests at once, by default 4")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a reply, by default 120")
    parser.add_argument("--max_retries", type=int, default=5, help="of a request that may yet succeed, by default 5")
    parser.add_argument("--price_in", type=float, help="price of a million prompt tokens")
    parser.add_argument("--price_out", type=float, help="price of a million completion tokens")
    parser.add_argument(
        "--max_failed", type=float, default=0.1, help="share of requests that may fail; above it the status is 1 [0.1]"
    )


def settings_of(args: argparse.Namespace, form: Form, inputs: Sequence[Path]) -> Settings:
    """The settings that the flags make.

    Args:
        inputs: files that are read, which no output may replace.

    Raises:
        UserError: a flag is outside its range, or a file can't be used.
    """
    if not 0 <= args.max_failed <= 1:
        raise UserError(f"--max_failed is {args.max_failed:g}; it must be a share from 0 to 1")
    _check_report(args.report, [*inputs, *([args.output] if args.output else [])])
    endpoint = EndpointConfig(
        args.model,
        args.endpoint,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        fields=args.request,
        timeout=args.timeout,
        max_retries=args.max_retries,
    )
    poll = Poll(form, load_rubric(args.rubric), args.votes, args.seed, args.workers)
    prices = Prices(args.price_in, args.price_out)
    return Settings(poll, endpoint, prices, args.output, args.report, args.max_failed)


def _check_report(path: Path | None, others: Sequence[Path]) -> None:
    if path is None:
        return
    if any(os.path.realpath(path) == os.path.realpath(other) for other in others):
        raise UserError(f"--report {printable(path)} is read, or is the --output: give another file")
    check_writable(path, "--report")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
