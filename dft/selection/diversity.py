"""Keep few rows that cover the instructions: k-center greedy (arXiv 1708.00489) on embeddings.

    python scripts/select_data.py diversity --model Qwen3-0.6B --data_files data/ --output diverse --num_rows 5000
    python scripts/select_data.py diversity --embeddings e.npy --data_files data/ --output diverse --radius 0.4

The instruction that is farthest from all kept ones is kept next, until there are enough or none is farther than the
radius. Embeddings are the means of a language model's last hidden states over the instruction's tokens, those of a
sentence-transformers model, or those of a file of numpy, a row for each valid row of --data_files.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dft.config.data import parse_role_map
from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.reading.rows import Conversation
from dft.selection.inputs import InputFile, find_inputs, read_inputs
from dft.selection.method import NO_INSTRUCTION, Command, Decide, Decision, Verdict
from dft.selection.model_flags import ModelFlags, add_model_arguments, check_max_length

PICKS = "picks.jsonl"


@dataclass(frozen=True)
class DiversityConfig:
    """How many rows are kept, and by which embeddings.

    Args:
        model: None where `embeddings` is given.
        embeddings: a file of numpy.
        num_rows, radius: at least one is given; see k_center_greedy.
        seed_files: rows that count as kept; with `embeddings`, those of `seed_embeddings` do.
        max_length: longer instructions are cut, in tokens.
        data_format, role_map: of the seed files.
    """

    model: ModelFlags | None = None
    embeddings: Path | None = None
    num_rows: int | None = None
    radius: float | None = None
    seed_files: list[InputFile] = field(default_factory=list)
    seed_embeddings: Path | None = None
    max_length: int = 8192
    data_format: str = "auto"
    role_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        check_max_length(self.max_length)
        if (self.model is None) == (self.embeddings is None):
            raise UserError("give one of --model and --embeddings")
        if self.num_rows is None and self.radius is None:
            raise UserError("give --num_rows, --radius or both: else every row would be kept")
        if self.num_rows is not None and self.num_rows < 1:
            raise UserError(f"--num_rows {self.num_rows} must be at least 1")
        if self.radius is not None and not 0 <= self.radius < float("inf"):
            raise UserError(f"--radius {self.radius:g} must be at least 0")
        if self.embeddings is not None and self.seed_files:
            raise UserError("--seed_files need a --model; beside --embeddings give their rows as --seed_embeddings")
        if self.embeddings is None and self.seed_embeddings is not None:
            raise UserError("--seed_embeddings belong to --embeddings; beside a --model give --seed_files")


def diversity(config: DiversityConfig) -> Decide:
    """The method of these settings."""

    def decide(rows: Iterator[Conversation]) -> Decision:
        from dft.selection.k_center import k_center_greedy

        conversations = list(rows)
        embedded, embeddings, seeds = _embeddings(conversations, config)
        if len(embedded) == 0:
            raise UserError("no row of --data_files has an instruction: there is nothing to choose by")
        cover = k_center_greedy(embeddings, config.num_rows, config.radius or 0.0, seeds)
        return _decision(conversations, embedded, cover.picks, cover.distances, cover.radius, config)

    return decide


def _embeddings(rows: list[Conversation], config: DiversityConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The rows that have an instruction, int64; their embeddings; those of the seeds."""
    from dft.selection.embeddings import embed_instructions, read_embeddings

    if config.embeddings is not None:
        found = read_embeddings(config.embeddings, "--embeddings", len(rows))
        path = config.seed_embeddings
        seeds = None if path is None else read_embeddings(path, "--seed_embeddings")
        if seeds is not None and seeds.shape[1] != found.shape[1]:
            raise UserError(
                f"--seed_embeddings have {seeds.shape[1]} dimensions and --embeddings {found.shape[1]}: they must be "
                "of the same model"
            )
        return np.arange(len(rows)), found, seeds
    seed_rows = list(read_inputs(config.seed_files, config.data_format, config.role_map))
    embedded, found = embed_instructions(rows + seed_rows, config.model, config.max_length)
    is_seed = embedded >= len(rows)
    return embedded[~is_seed], found[~is_seed], found[is_seed] if is_seed.any() else None


def _decision(
    rows: list[Conversation],
    embedded: np.ndarray,
    picks: np.ndarray,
    distances: np.ndarray,
    radius: float,
    config: DiversityConfig,
) -> Decision:
    """The decision.

    Args:
        embedded: rows that have an instruction; picks: places in them.
    """
    verdicts = [NO_INSTRUCTION] * len(rows)
    for index in embedded:
        verdicts[index] = Verdict("covered", "a kept row has a similar instruction")
    of_row = np.full(len(rows), np.nan)
    table = []
    for order, (index, distance) in enumerate(zip(embedded[picks].tolist(), distances.tolist(), strict=True), start=1):
        of_row[index] = distance if np.isfinite(distance) else np.nan
        shown = round(distance, 6) if np.isfinite(distance) else None  # the first has none before it
        verdicts[index] = Verdict(score=shown)
        row = rows[index]
        table.append({"order": order, "path": printable(row.path), "line": row.line, "distance": shown})
    notes = [f"No instruction is farther than {radius:.4g} from a kept one."]
    if config.num_rows is not None and len(picks) < min(config.num_rows, len(embedded)):
        notes.append(f"{len(picks):,} rows are enough; all others are that near.")
    return Decision(verdicts, {"distance when kept": of_row}, {PICKS: table}, {"radius": round(radius, 6)}, notes)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=path_argument, help="directory of a language or sentence-transformers model")
    parser.add_argument("--embeddings", type=path_argument, help="file of numpy, instead of a model")
    parser.add_argument("--num_rows", type=int, help="at most so many rows are kept")
    parser.add_argument("--radius", type=float, help="Euclidean distance at which a row counts as covered")
    parser.add_argument("--seed_files", nargs="+", default=[], help="chat files whose rows count as kept")
    parser.add_argument("--seed_embeddings", type=path_argument, help="the same, beside --embeddings")
    parser.add_argument("--max_length", type=int, default=8192, help="longer instructions are cut, in tokens")
    add_model_arguments(parser)


def _method(args: argparse.Namespace) -> Decide:
    config = DiversityConfig(
        model=None if args.model is None else ModelFlags.of(args, args.model, "--model"),
        embeddings=args.embeddings,
        num_rows=args.num_rows,
        radius=args.radius,
        seed_files=find_inputs(args.seed_files, "seed_files") if args.seed_files else [],
        seed_embeddings=args.seed_embeddings,
        max_length=args.max_length,
        data_format=args.data_format,
        role_map=parse_role_map(args.role_map),
    )
    return diversity(config)


COMMAND = Command(
    "diversity",
    "keep few rows that cover the instructions",
    __doc__,
    _add_arguments,
    _method,
    also_read=("seed_files",),
)
