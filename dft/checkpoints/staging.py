"""Checkpoints are written beside their place and get it when they are whole: checkpoint-N is whole or absent.

All ranks save together. The output directory may be shared between all nodes, some of them or none; what decides is
which nodes see each other's files.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from dft.checkpoints.manifest import THREADS, flush, flush_and_describe, list_files, manifest_name, write_manifest
from dft.checkpoints.shares import Nodes, assign_files
from dft.distributed import gather_in_training
from dft.launched import local_rank

logger = logging.getLogger(__name__)

# In the output directory. It begins with an underscore, so that Trainer doesn't push it to the hub, and not with
# "checkpoint-", so that it isn't taken for one.
UNFINISHED = "_unfinished"
REPLACED = "replaced"  # in it: a checkpoint that made way for another of its name
CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*"
CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


@dataclass
class StagedSave:
    """One save: begin, writing, publish. All ranks do each of them together.

    Args:
        run_dir: where the checkpoint is to be.
        name: of the checkpoint.

    Attributes:
        staged: the directory to write to until the checkpoint is published.
        final: its place.
    """

    run_dir: Path
    name: str
    staged: Path = field(init=False)
    final: Path = field(init=False)
    _rank: int = field(init=False)
    _nodes: Nodes = field(init=False)

    def __post_init__(self):
        self.staged, self.final = self.run_dir / UNFINISHED / self.name, self.run_dir / self.name
        self._rank = dist.get_rank() if dist.is_initialized() else 0

    def begin(self, needed: int) -> None:
        """Makes the directory to write to, if there is room for it.

        Args:
            needed: bytes that this rank will write at least.

        Raises:
            OSError: on all ranks, if a node has less room than its ranks need together.
        """
        self._nodes = self._find_nodes()
        is_first, free = self._rank in self._nodes.first_ranks, None
        if is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.run_dir)
            free = shutil.disk_usage(self.run_dir).free
        needs, room = zip(*gather_in_training((needed, free)), strict=True)
        for node, first in enumerate(self._nodes.first_ranks):
            node_needs = sum(needs[rank] for rank in self._nodes.ranks_of(node))
            if node_needs > room[first]:
                raise no_room(self.final, node_needs, room[first])
        if is_first:
            self.staged.mkdir(parents=True, exist_ok=True)  # another node that shares it may have made it
            if len(self._nodes.first_ranks) > 1:
                self._mark(self._rank).touch()

    def publish(self, about: dict[str, Any]) -> int:
        """Waits until all that was written is on the disk, writes the manifest, and gives the checkpoint its place.

        Args:
            about: the content of the manifest, without its files.

        Returns:
            The bytes that the checkpoint takes in the directory that this rank has finished; 0 on the other ranks.
        """
        gather_in_training(None)  # all have written
        firsts = self._nodes.first_ranks
        found = gather_in_training(self._look() if self._rank in firsts else None)
        directory_of = [found[rank][0] for rank in firsts]
        shares = assign_files(self._nodes, [found[rank][1] for rank in firsts], directory_of)
        node = self._nodes.node_of(self._rank)
        threads = max(1, min(THREADS, (os.cpu_count() or 1) // len(self._nodes.ranks_of(node))))
        described = gather_in_training(flush_and_describe(self.staged, shares[self._rank], threads))
        size = 0
        if self._rank == directory_of[node]:
            entries: dict[str, Any] = {}
            for rank, files in enumerate(described):
                if directory_of[self._nodes.node_of(rank)] == self._rank:
                    entries |= files
            size = sum(entry["size"] for entry in entries.values())
            manifest = self.staged / manifest_name(self._rank)
            write_manifest(manifest, about | {"files": dict(sorted(entries.items()))})
            self._give_place()
        gather_in_training(None)  # it is there for all ranks
        return size

    def give_up(self) -> None:
        """Gives the room back that an unfinished save takes, as far as possible."""
        shutil.rmtree(self.staged, ignore_errors=True)

    def _find_nodes(self) -> Nodes:
        """The nodes; ranks of one node that write to other directories count as of another."""
        ranks = gather_in_training((local_rank(), str(self.run_dir.absolute())))
        earlier = [None, *(directory for _, directory in ranks)]
        return Nodes([rank if directory == earlier[i] else 0 for i, (rank, directory) in enumerate(ranks)])

    def _mark(self, rank: int) -> Path:
        """A file by which other nodes see that they share the directory of this rank."""
        return self.run_dir / UNFINISHED / f"node-of-rank-{rank}"

    def _look(self) -> tuple[int, dict[str, int]]:
        """The first rank whose node shares this node's directory, and the files that this node sees."""
        sharing = [rank for rank in self._nodes.first_ranks if self._mark(rank).exists()]
        return min(sharing, default=self._rank), list_files(self.staged)

    def _give_place(self) -> None:
        for directory in [self.staged, *(path for path in self.staged.rglob("*") if path.is_dir())]:
            flush(directory)
        if self.final.exists():
            replaced = self.run_dir / UNFINISHED / REPLACED
            replaced.mkdir()
            self.final.rename(replaced / self.name)
        self.staged.rename(self.final)
        flush(self.run_dir)
        _remove(self.run_dir / UNFINISHED)


def no_room(checkpoint: Path, needed: int, free: int) -> OSError:
    """What to raise where a checkpoint won't fit, before anything is written of it."""
    return OSError(
        errno.ENOSPC,
        f"the checkpoint takes at least {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free. Earlier ones "
        "are as they were: make room, and go on with --resume_from_checkpoint last",
        str(checkpoint),
    )


def clear_leftovers(run_dir: Path) -> None:
    """Removes what a save left that was cut off, as by a killed process, and says so.

    A checkpoint that had made way for another one, which never came, gets its place back.
    """
    root = run_dir / UNFINISHED
    for replaced in sorted(root.glob(f"{REPLACED}/{CHECKPOINTS}")):
        if not (run_dir / replaced.name).exists():
            with suppress(FileNotFoundError):  # another node has done it
                replaced.rename(run_dir / replaced.name)
                logger.warning("%s is back in its place: the save that was to replace it was cut off", replaced.name)
    names = sorted(path.name for path in root.glob(CHECKPOINTS))
    if root.is_dir() and _remove(root) and names:
        logger.warning("Removed what is left of a save of %s that was cut off in %s", ", ".join(names), run_dir)
    for earlier in run_dir.glob(f"{UNFINISHED}.*"):
        shutil.rmtree(earlier, ignore_errors=True)


def _remove(directory: Path) -> bool:
    """Removes a directory, which loses its name at once; says whether it was this process that did."""
    doomed = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}.", dir=directory.parent))
    try:
        directory.rename(doomed / directory.name)
    except FileNotFoundError:  # another node that shares the directory was first
        return False
    finally:
        shutil.rmtree(doomed, ignore_errors=True)
    return True


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in a directory, those of later steps first."""
    found = [path for path in run_dir.glob(CHECKPOINTS) if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint tells."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


def rotate(run_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Deletes the oldest checkpoints until `limit` are left; those to keep stay, whatever the limit and their age.

    Trainer's own would delete the checkpoint that it has just written where the times of files mean nothing and a
    longer run was in the directory before.
    """
    if not limit:
        return
    paths = [Path(path) for path in sort_checkpoints(str(run_dir), use_mtime=True)]
    paths = [path for path in paths if CHECKPOINT_NAME.fullmatch(path.name)]  # not those that were reshaped
    kept = {path.resolve() for path in keep}
    others = [path for path in paths if path.resolve() not in kept]
    excess = len(paths) - max(limit, len(paths) - len(others))
    for path in others[: max(excess, 0)]:
        _remove(path)
