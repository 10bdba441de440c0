"""A checkpoint is whole or absent, wherever its writing is cut off; an older one is found then."""

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dft.checkpoints import staging
from dft.checkpoints.integrity import check_whole
from dft.checkpoints.manifest import read_manifests
from dft.checkpoints.resume import find_checkpoint
from dft.checkpoints.shares import Nodes, assign_files
from dft.checkpoints.staging import StagedSave, clear_leftovers, rotate
from dft_trainer import DFTTrainer

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
WRITING = ("open", "torch.save", "os.rename", "shutil.rmtree")  # audit events


def last(output_dir: Path) -> str:
    """The name of the checkpoint that `last` finds."""
    settings = {"max_steps": 9, "num_train_epochs": 3.0, "world_size": 1}
    settings |= {"deepspeed_plugin": None, "fsdp_plugin_args": None}
    found, _ = find_checkpoint(SimpleNamespace(resume_from_checkpoint="last", output_dir=str(output_dir), **settings))
    return Path(found).name


def files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def save_until(trainer: DFTTrainer, number: int | None) -> int:
    """Saves in a forked process that is killed at an event of writing; returns the number of events if it isn't."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    events = 0

    def count(event: str, args: tuple) -> None:
        nonlocal events
        if event in WRITING and (event != "open" or args[1] == "w"):
            if events == number:
                os._exit(0)
            events += 1

    def audited_save(*args, original=torch.save) -> None:
        sys.audit("torch.save")
        original(*args)

    torch.save = audited_save
    sys.addaudithook(count)
    try:
        trainer._save_checkpoint(trainer.model, None)
    finally:
        os._exit(events)


@pytest.mark.parametrize("newest", [2, 3])
def test_a_save_that_is_cut_off_anywhere_leaves_what_was_there(make_trainer, tmp_path, caplog, newest):
    """At the start of every file that is written, of every renaming and every removal.

    Step 2 has a checkpoint already, which is replaced.
    """
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    trainer.state.global_step = newest
    found, number, ended = [], 0, 0
    while not ended:
        ended = save_until(trainer, number)
        for checkpoint in tmp_path.glob("checkpoint-*"):
            check_whole(checkpoint)
        found.append(last(tmp_path))
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", found[-1]}
        assert not list(tmp_path.glob("_unfinished*"))
        number += 1
    assert number > 10
    assert found == sorted(found)
    assert {*found} == {"checkpoint-2", f"checkpoint-{newest}"}
    assert f"Removed what is left of a save of checkpoint-{newest} that was cut off" in caplog.text


def test_a_save_that_fails_says_where_and_gives_the_room_back(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(**SETTINGS)
    trainer.train()
    trainer.state.global_step = 3

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left") as caught:
        trainer._save_checkpoint(trainer.model, None)
    assert f"{tmp_path}/checkpoint-3 could not be saved" in caught.value.__notes__[0]
    assert not list(tmp_path.glob("_unfinished/*"))
    assert last(tmp_path) == "checkpoint-2"
    monkeypatch.undo()
    trainer._save_checkpoint(trainer.model, None)  # there is room again
    assert last(tmp_path) == "checkpoint-3"
    check_whole(tmp_path / "checkpoint-3")


def test_nothing_is_written_where_there_is_no_room(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(**SETTINGS | {"max_steps": 1})
    trainer.train()
    size = trainer._last_size
    written = [path for path in (tmp_path / "checkpoint-1").iterdir() if path.name != "manifest.json"]
    assert size == sum(path.stat().st_size for path in written)
    trainer.state.global_step = 2
    before = files(tmp_path)
    free = SimpleNamespace(free=size - 1)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    for known in (True, False):
        if not known:  # before the first save of a run, weights and optimizer count
            trainer._last_size = None
            free.free = size // 2
        with pytest.raises(OSError, match="takes at least 0.00 GiB, and 0.00 GiB are free") as caught:
            trainer._save_checkpoint(trainer.model, None)
        assert caught.value.filename == str(tmp_path / "checkpoint-2")
        assert files(tmp_path) == before
    free.free = size
    trainer._save_checkpoint(trainer.model, None)
    assert last(tmp_path) == "checkpoint-2"


def test_callbacks_and_pushes_see_a_checkpoint_in_its_place(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(**SETTINGS)
    pushed = []

    def push(self, directory):
        pushed.append((Path(directory).name, check_whole(Path(directory))))

    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    trainer.args.push_to_hub = True
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    trainer.train()
    assert pushed == [("checkpoint-1", None), ("checkpoint-2", None)]


# ---- rotation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [], [1, 2, 3, 100]),
        (1, [3], [3]),
        (2, [3, 1], [1, 3]),
        (1, [3, 1], [1, 3]),
        (3, [3], [2, 3, 100]),
        (9, [3], [1, 2, 3, 100]),
    ],
)
def test_what_was_just_written_stays_where_times_say_nothing(tmp_path, limit, keep, left):
    """Here all are of one moment, and a longer run was in the directory before."""
    for step in (1, 2, 3, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, limit, [tmp_path / f"checkpoint-{step}" for step in keep])
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left


def test_a_checkpoint_that_made_way_for_one_that_never_came_is_put_back(tmp_path, caplog):
    replaced = tmp_path / "_unfinished" / "replaced"
    for name in ("checkpoint-3", "checkpoint-4"):
        (replaced / name).mkdir(parents=True)
        (replaced / name / "earlier").touch()
    (tmp_path / "checkpoint-4").mkdir()  # the one that came
    clear_leftovers(tmp_path)
    assert (tmp_path / "checkpoint-3" / "earlier").exists()
    assert not (tmp_path / "checkpoint-4" / "earlier").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    assert "checkpoint-3 is back in its place" in caplog.text


def test_a_reshaped_checkpoint_is_neither_counted_nor_deleted(tmp_path):
    for name in ("checkpoint-1", "checkpoint-1-reshaped", "checkpoint-2"):
        (tmp_path / name).mkdir()
    rotate(tmp_path, 2, [])
    assert len(list(tmp_path.iterdir())) == 3
    rotate(tmp_path, 1, [tmp_path / "checkpoint-2"])
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1-reshaped", "checkpoint-2"}


# ---- several nodes ------------------------------------------------------------------------------

NODES = Nodes([0, 1, 0, 1])
SHARDS = {f"global_step1/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": 100 for rank in range(4)}
RANDOM = {f"rng_state_{rank}.pth": 1 for rank in range(4)}
REST = {"model.safetensors": 50, "trainer_state.json": 1, "latest": 1}


def test_ranks_are_on_their_nodes():
    assert NODES.first_ranks == [0, 2]
    assert [NODES.node_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [NODES.ranks_of(node) for node in range(2)] == [[0, 1], [2, 3]]


def test_on_a_shared_disk_every_file_is_described_once_by_who_wrote_it():
    """Node 1 doesn't yet see what node 0 wrote last, as over a network."""
    listing = SHARDS | RANDOM | REST
    late = {name: size for name, size in listing.items() if name not in ("latest", "rng_state_0.pth")}
    for listings in ([listing, listing], [listing, late], [late, listing]):
        shares = assign_files(NODES, listings, [0, 0])
        assert sorted(name for share in shares for name in share) == sorted(listing)
        for rank, share in enumerate(shares):
            assert {name for name in share if "optim_states" in name} == {list(SHARDS)[rank]}
            for name in share:
                assert name in listings[NODES.node_of(rank)]


def test_on_disks_of_their_own_nodes_describe_what_they_have():
    """A name may be on both, as with --save_on_each_node."""
    of_node = [dict(list(SHARDS.items())[i : i + 2]) | REST for i in (0, 2)]
    shares = assign_files(NODES, of_node, [0, 2])
    for node, listing in enumerate(of_node):
        described = [name for rank in NODES.ranks_of(node) for name in shares[rank]]
        assert sorted(described) == sorted(listing)


def test_files_without_a_rank_are_divided_by_size():
    listing = {f"model-{i}.safetensors": 100 - i for i in range(8)}
    shares = assign_files(Nodes([0, 1]), [listing], [0])
    assert [len(share) for share in shares] == [4, 4]


class Ranks:
    """Four ranks of two nodes, as threads that save together."""

    def __init__(self, monkeypatch, local_ranks: list[int]):
        self._here, self._met, self._values = threading.local(), threading.Barrier(4), [None] * 4
        monkeypatch.setattr(staging, "gather_in_training", self._gather)
        monkeypatch.setattr(staging, "local_rank", lambda: local_ranks[self._here.rank])

    def _gather(self, value: object) -> list:
        self._values[self._here.rank] = value
        self._met.wait(timeout=60)
        values = list(self._values)
        self._met.wait(timeout=60)
        return values

    def _save(self, directory: Path, rank: int, needed: int = 1) -> int:
        self._here.rank = rank
        save = StagedSave(directory, "checkpoint-1")
        save._rank = rank
        save.begin(needed)
        (save.staged / "global_step1").mkdir(parents=True, exist_ok=True)
        (save.staged / "global_step1" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_text("x" * 9)
        if rank == 0:
            (save.staged / "model.safetensors").write_text("weights")
        return save.publish({"made_with": {}, "versions": {}})

    def save(self, directories: list[Path], **kwargs) -> list[int]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(partial(self._save, **kwargs), directories, range(4)))


PARTS = [f"global_step1/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4)]


@pytest.mark.parametrize(
    ("local_ranks", "places", "manifests"),
    [
        ([0, 1, 0, 1], "aaaa", {"a": {"manifest.json": [0, 1, 2, 3]}}),
        ([0, 1, 2, 3], "aaaa", {"a": {"manifest.json": [0, 1, 2, 3]}}),
        ([0, 1, 0, 1], "aabb", {"a": {"manifest.json": [0, 1]}, "b": {"manifest-2.json": [2, 3]}}),
        ([0, 0, 0, 0], "abab", {"a": {"manifest.json": [0, 2]}, "b": {"manifest-1.json": [1, 3]}}),
        ([0, 1, 2, 3], "aaab", {"a": {"manifest.json": [0, 1, 2]}, "b": {"manifest-3.json": [3]}}),
    ],
)
def test_every_directory_gets_a_manifest_of_what_is_there(tmp_path, monkeypatch, local_ranks, places, manifests):
    """Whether all nodes share one, some of them do, or ranks of a node write to their own."""
    sizes = Ranks(monkeypatch, local_ranks).save([tmp_path / place for place in places])
    for place, expected in manifests.items():
        assert [path.name for path in (tmp_path / place).iterdir()] == ["checkpoint-1"]
        checkpoint = tmp_path / place / "checkpoint-1"
        check_whole(checkpoint)
        found = {name: content["files"].keys() for name, content in read_manifests(checkpoint).items()}
        weights = {"model.safetensors"} if place == "a" else set()
        assert found == {name: {PARTS[rank] for rank in ranks} | weights for name, ranks in expected.items()}
    assert sum(sizes) == 4 * 9 + len("weights")
    assert [bool(size) for size in sizes] == [rank == places.index(places[rank]) for rank in range(4)]


def test_no_node_saves_where_one_has_no_room(tmp_path, monkeypatch):
    """Each rank needs a byte less than there is, and the two of a node more."""
    ranks = Ranks(monkeypatch, [0, 1, 0, 1])
    monkeypatch.setattr(
        staging.shutil, "disk_usage", lambda place: SimpleNamespace(free=9 if place.name == "b" else 99)
    )
    for needed, fits in ((5, False), (4, True)):
        if fits:
            ranks.save([tmp_path / place for place in "aabb"], needed=needed)
        else:
            with pytest.raises(OSError, match="takes at least"):
                ranks.save([tmp_path / place for place in "aabb"], needed=needed)
        for place in "ab":
            assert (tmp_path / place / "checkpoint-1").exists() == fits


def test_a_manifest_says_what_the_run_was(make_trainer, tmp_path):
    make_trainer(**SETTINGS, learning_rate=1e-3, lr_scheduler_type="cosine").train()
    content = json.loads((tmp_path / "checkpoint-2" / "manifest.json").read_text())
    assert content["step"] == 2
    made_with = content["made_with"]
    facts = {"world_size": 1, "engine": "torch", "zero_stage": None, "seed": 42, "data_seed": 42, "objective": "dft"}
    facts |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "rows_per_step": 8, "training_rows": 16}
    assert made_with.items() >= facts.items()
    assert {"torch", "transformers", "accelerate", "deepspeed", "python"} <= content["versions"].keys()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert content["files"].keys() == names - {"manifest.json"}
