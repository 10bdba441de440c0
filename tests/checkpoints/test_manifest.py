"""The manifest: a file that isn't as it was written is named, and what replaces a file leaves a whole checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dft.checkpoints import manifest
from dft.checkpoints.integrity import check_whole
from dft.checkpoints.manifest import flush_and_describe, list_files, read_manifests, replace_file, write_manifest
from dft.errors import UserError


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a flipped bit": flip,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of files of any kind, one of them in a directory of its own, with its manifest."""
    directory = tmp_path / "checkpoint-1"
    (directory / "global_step1").mkdir(parents=True)
    (directory / "trainer_state.json").write_text('{"global_step": 1}')
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (directory / "global_step1" / "optim_states.pt").write_bytes(b"not of a format that could be read")
    entries = flush_and_describe(directory, list_files(directory), threads=2)
    write_manifest(directory / "manifest.json", {"step": 1, "made_with": {}, "versions": {}, "files": entries})
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_that_is_not_as_it_was_written_is_named(checkpoint, damage, tmp_path):
    check_whole(checkpoint)
    for name in set(list_files(checkpoint)) - {"manifest.json"}:
        broken = tmp_path / "broken"
        shutil.copytree(checkpoint, broken)
        DAMAGES[damage](broken / name)
        with pytest.raises(UserError) as caught:
            check_whole(broken)
        assert str(broken / name) in str(caught.value)
        assert sum(str(broken) + "/" in line for line in str(caught.value).splitlines()) == 1
        shutil.rmtree(broken)


def test_another_step_in_the_state_is_seen(checkpoint):
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(UserError, match="trainer_state.json: damaged, its content isn't what was written"):
        check_whole(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [flip, DAMAGES["empty"], lambda path: path.write_text(path.read_text().replace('"step": 1', '"step": 2'))],
)
def test_a_damaged_manifest_is_named(checkpoint, damage):
    damage(checkpoint / "manifest.json")
    with pytest.raises(UserError, match="manifest.json: cut or damaged"):
        check_whole(checkpoint)


def test_what_is_added_to_a_checkpoint_is_not_in_its_way(checkpoint):
    (checkpoint / "README.md").write_text("mine")
    check_whole(checkpoint)


def test_a_manifest_of_another_version_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(manifest, "VERSION", 2)
    with pytest.raises(UserError, match="of version 1, which this program doesn't know"):
        check_whole(checkpoint)


def test_manifests_of_several_disks_can_be_put_together(checkpoint, tmp_path):
    """Each knows the files of its own; a file of either that is damaged is named."""
    other = tmp_path / "of_node_1" / "rng_state_8.pth"
    other.parent.mkdir()
    other.write_bytes(b"random")
    entries = flush_and_describe(other.parent, [other.name], threads=1)
    write_manifest(other.parent / "manifest-8.json", {"made_with": {}, "versions": {}, "files": entries})
    check_whole(other.parent)
    shutil.copytree(other.parent, checkpoint, dirs_exist_ok=True)
    check_whole(checkpoint)
    assert set(read_manifests(checkpoint)) == {"manifest.json", "manifest-8.json"}
    flip(checkpoint / other.name)
    with pytest.raises(UserError, match="rng_state_8.pth: damaged"):
        check_whole(checkpoint)


def test_a_checkpoint_is_whole_at_every_moment_of_a_replacement(checkpoint, monkeypatch):
    """Where it is cut off before, between and after the two files that are written."""
    original, calls = manifest.write_text, []

    def stops(path: Path, text: str) -> None:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(path.name)
        original(path, text)

    monkeypatch.setattr(manifest, "write_text", stops)
    for number in (0, 1):
        stop_at = number
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            replace_file(checkpoint, "trainer_state.json", '{"global_step": 1, "best": 1}')
        check_whole(checkpoint)
        assert json.loads((checkpoint / "trainer_state.json").read_text()) == {"global_step": 1}
    stop_at = None
    replace_file(checkpoint, "trainer_state.json", '{"global_step": 1, "best": 1}')
    check_whole(checkpoint)
    assert json.loads((checkpoint / "trainer_state.json").read_text()) == {"global_step": 1, "best": 1}
    assert not list(checkpoint.glob("*unfinished"))
