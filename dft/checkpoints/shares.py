"""Which rank describes which file of a checkpoint that all ranks have written, on shared disks or on their own."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# ranks in the names of files: of DeepSpeed's parts, of Trainer's random numbers, of torch.distributed.checkpoint
RANK_IN_NAME = re.compile(r"(?:pp_rank_|rng_state_|__)(\d+)[_.]")
Listing = dict[str, int]  # {path of a file: its size}


@dataclass(frozen=True)
class Nodes:
    """Which ranks are on which node. The ranks of a node follow each other.

    Args:
        local_ranks: of each rank, its number on its node.
    """

    local_ranks: Sequence[int]

    @cached_property
    def first_ranks(self) -> list[int]:
        """The first rank of each node."""
        return [rank for rank, on_node in enumerate(self.local_ranks) if on_node == 0]

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return bisect_right(self.first_ranks, rank) - 1

    def ranks_of(self, node: int) -> list[int]:
        """The ranks of a node."""
        first, end = [*self.first_ranks, len(self.local_ranks)][node : node + 2]
        return list(range(first, end))


def assign_files(nodes: Nodes, listings: Sequence[Listing], directory_of: Sequence[int]) -> list[list[str]]:
    """Divides files over the ranks of the nodes that see them.

    A file goes to the rank that has probably written it, as its name says, in whose node's memory it still is; others
    are divided evenly by size over the ranks of the first node that sees them.

    Args:
        listings: what each node sees.
        directory_of: a number of the directory that each node sees; nodes that share one have the same.

    Returns:
        The files of each rank.
    """
    shares: list[list[str]] = [[] for _ in nodes.local_ranks]
    load = [0] * len(shares)
    for directory in sorted(set(directory_of)):
        files: dict[str, tuple[int, int]] = {}  # size, and the first node that sees it
        for node, listing in enumerate(listings):
            if directory_of[node] == directory:
                for name, size in listing.items():
                    files.setdefault(name, (size, node))
        for name, (size, node) in sorted(files.items(), key=lambda item: (-item[1][0], item[0])):
            found = RANK_IN_NAME.search(name)
            rank = int(found[1]) if found else None
            if rank is None or rank >= len(shares) or not _sees(nodes, listings, directory_of, rank, name, directory):
                rank = min(nodes.ranks_of(node), key=lambda candidate: load[candidate])
            load[rank] += size
            shares[rank].append(name)
    return shares


def _sees(
    nodes: Nodes, listings: Sequence[Listing], directory_of: Sequence[int], rank: int, name: str, directory: int
) -> bool:
    node = nodes.node_of(rank)
    return directory_of[node] == directory and name in listings[node]
