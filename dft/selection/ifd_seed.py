"""Choose the rows on which a base model is trained before it computes IFD: some of each cluster of instructions.

    python scripts/select_data.py ifd-seed --model Qwen3-0.6B --data_files data/ --output seed
    bash scripts/train.sh --model_name_or_path Qwen3-0.6B --data_files seed/kept --num_train_epochs 1 --output_dir warm
    python scripts/select_data.py ifd --model warm --data_files data/ --output by_ifd --keep_share 0.1

This is the first step of arXiv 2308.12032: 100 clusters of the instructions' mean hidden states by k-means, 10 rows
drawn from each, one epoch of training. The second command is the training; a model that follows instructions already
needs neither.
"""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.reading.rows import Conversation
from dft.selection.method import KEPT, NO_INSTRUCTION, Command, Decide, Decision, Verdict
from dft.selection.model_flags import ModelFlags, add_model_arguments, check_max_length


@dataclass(frozen=True)
class IfdSeedConfig:
    """How many rows are drawn.

    Args:
        warmup_clusters: of k-means.
        warmup_rows: of each cluster, or all where it has fewer.
        seed: of the clusters and of the draw.
        max_length: longer instructions are cut, in tokens.
        kept: where the chosen rows will be, for the command that trains on them.
    """

    model: ModelFlags
    warmup_clusters: int = 100
    warmup_rows: int = 10
    seed: int = 42
    max_length: int = 8192
    kept: str = "OUTPUT/kept"

    def __post_init__(self):
        check_max_length(self.max_length)
        if self.warmup_clusters < 1 or self.warmup_rows < 1:
            raise UserError("--warmup_clusters and --warmup_rows must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} must be at least 0")


def ifd_seed(config: IfdSeedConfig) -> Decide:
    """The method of these settings."""

    def decide(rows: Iterator[Conversation]) -> Decision:
        from dft.selection.embeddings import embed_instructions
        from dft.selection.k_means import k_means

        conversations = list(rows)
        embedded, embeddings = embed_instructions(conversations, config.model, config.max_length)
        if len(embedded) == 0:
            raise UserError("no row of --data_files has an instruction: there is nothing to cluster")
        of_embedded = k_means(embeddings, config.warmup_clusters, config.seed)
        cluster = np.full(len(conversations), -1)
        cluster[embedded] = of_embedded
        chosen = draw(cluster, config.warmup_rows, np.random.default_rng(config.seed))
        verdicts = [_verdict(int(c), bool(k)) for c, k in zip(cluster, chosen, strict=True)]
        facts = {"clusters": len(np.unique(of_embedded))}
        return Decision(verdicts, facts=facts, notes=[how_to_go_on(config)])

    return decide


def how_to_go_on(config: IfdSeedConfig) -> str:
    """The sentence that says how to train on the chosen rows."""
    flags = ["--model_name_or_path", str(config.model.directory), "--data_files", config.kept]
    command = shlex.join(["bash", "scripts/train.sh", *flags, "--num_train_epochs", "1"])
    return f"Now train for one epoch: {printable(command)}"


def draw(cluster: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Which rows are drawn, bool [R]: at most `count` of each cluster, int [R]; none of those below 0."""
    chosen = np.zeros(len(cluster), dtype=bool)
    for number in np.unique(cluster[cluster >= 0]):
        members = np.flatnonzero(cluster == number)
        chosen[rng.choice(members, min(count, len(members)), replace=False)] = True
    return chosen


def _verdict(cluster: int, chosen: bool) -> Verdict:
    if cluster < 0:
        return NO_INSTRUCTION
    return KEPT if chosen else Verdict("not_drawn", f"others of cluster {cluster} were drawn")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=path_argument, required=True, help="directory of the base model")
    parser.add_argument("--warmup_clusters", type=int, default=100, help="clusters of instructions; by default 100")
    parser.add_argument("--warmup_rows", type=int, default=10, help="rows drawn from each; by default 10")
    parser.add_argument("--seed", type=int, default=42, help="of the clusters and of the draw")
    parser.add_argument("--max_length", type=int, default=8192, help="longer instructions are cut, in tokens")
    add_model_arguments(parser)


def _method(args: argparse.Namespace) -> Decide:
    flags = ModelFlags.of(args, args.model, "--model")
    settings = (args.warmup_clusters, args.warmup_rows, args.seed, args.max_length)
    return ifd_seed(IfdSeedConfig(flags, *settings, kept=f"{args.output}/kept"))


COMMAND = Command("ifd-seed", "choose rows to train on before IFD", __doc__, _add_arguments, _method)
