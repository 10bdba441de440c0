"""A checkpoint without a manifest: files that are cut or damaged are named, as far as their formats tell."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dft.checkpoints import integrity
from dft.checkpoints.integrity import check_complete, check_whole
from dft.checkpoints.resume import find_checkpoint
from dft.errors import UserError


@pytest.fixture
def checkpoint(make_trainer, tmp_path) -> Path:
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    torch.save({"scale": torch.ones(1)}, tmp_path / "checkpoint-1" / "scaler.pt")  # as with fp16
    (tmp_path / "checkpoint-1" / "manifest.json").rename(tmp_path / "checkpoint-1" / "made_with.json")
    return tmp_path / "checkpoint-1"


def of_deepspeed(checkpoint: Path) -> Path:
    """The checkpoint with parts like DeepSpeed's instead of an optimizer."""
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt"):
        (checkpoint / name).unlink()
    parts = checkpoint / "global_step1"
    parts.mkdir()
    (checkpoint / "latest").write_text("global_step1")
    for rank in range(2):
        torch.save({"flat": torch.rand(1000)}, parts / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"module": {}}, parts / "mp_rank_00_model_states.pt")
    return checkpoint


def overwrite(path: Path, start: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut by a few bytes": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another file": lambda path: path.write_bytes(b"<html>404: there is nothing here</html>"),
    "damaged at its start": lambda path: overwrite(path, 0, b"\xff" * 16),
}
FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json")
FILES += ("config.json", "made_with.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(checkpoint, damage, tmp_path):
    check_whole(checkpoint)
    check_complete(checkpoint)
    for name in FILES:
        broken = tmp_path / "broken"
        shutil.copytree(checkpoint, broken)
        DAMAGES[damage](broken / name)
        with pytest.raises(UserError, match=f"{broken / name}: .*damaged"):
            check_whole(broken)
        shutil.rmtree(broken)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_of_deepspeeds_is_named(checkpoint, damage):
    path = of_deepspeed(checkpoint) / "global_step1" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    check_whole(checkpoint)
    check_complete(checkpoint)
    DAMAGES[damage](path)
    with pytest.raises(UserError, match=f"{path.name}: .*damaged"):
        check_whole(checkpoint)


def test_damage_in_the_middle_of_what_torch_saved_is_found(checkpoint):
    """Anywhere in a file: either it is found, or nothing that is loaded was hit."""
    path = checkpoint / "optimizer.pt"
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    found = [start for start in range(0, len(whole), len(whole) // 60) if is_refused_where_damaged(path, start, state)]
    assert path.read_bytes() == whole
    assert len(found) > 30


def is_refused_where_damaged(path: Path, start: int, state: dict) -> bool:
    """Whether 8 other bytes in an optimizer's file are found; where they aren't, nothing that is loaded was hit."""
    whole = path.read_bytes()
    overwrite(path, start, bytes(byte ^ 0xFF for byte in whole[start : start + 8]))
    try:
        check_whole(path.parent)
    except UserError:
        return True
    else:  # such as the padding between records
        assert str(torch.load(path, weights_only=True)) == str(state)
        return False
    finally:
        path.write_bytes(whole)


def test_of_large_files_small_records_are_read(checkpoint, monkeypatch):
    """A file that is cut is found whatever its size."""
    monkeypatch.setattr(integrity, "READ_WHOLE", 1000)
    monkeypatch.setattr(integrity, "SMALL_RECORD", 1 << 16)
    path = checkpoint / "optimizer.pt"
    whole = path.read_bytes()
    check_whole(checkpoint)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="optimizer.pt: cut or damaged"):
        check_whole(checkpoint)
    path.write_bytes(whole.replace(b"exp_avg", b"exp_xyz", 1))
    with pytest.raises(UserError, match="optimizer.pt: cut or damaged"):
        check_whole(checkpoint)


def test_all_that_is_damaged_is_in_one_message(checkpoint):
    for name in ("optimizer.pt", "rng_state.pth"):
        DAMAGES["cut in half"](checkpoint / name)
    with pytest.raises(UserError) as caught:
        check_whole(checkpoint)
    assert "optimizer.pt" in str(caught.value)
    assert "rng_state.pth" in str(caught.value)
    assert "scheduler.pt" not in str(caught.value)


def test_a_missing_shard_is_named(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    index = {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    for i, half in enumerate(halves):
        save_file(half, checkpoint / f"model-{i}.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    check_whole(checkpoint)
    (checkpoint / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match="model-1.safetensors: missing"):
        check_whole(checkpoint)


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint, name):
    """Trainer would leave the optimizer as it is, or take random numbers anew, without a word."""
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        check_complete(checkpoint)


def test_missing_parts_of_deepspeed_are_named(checkpoint):
    of_deepspeed(checkpoint)
    check_complete(checkpoint)
    (checkpoint / "latest").write_text("global_step7")
    with pytest.raises(UserError, match="latest: missing, or it names what is missing"):
        check_complete(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", "[1]", "trainer_state.json"),
        ("trainer_state.json", '{"global_step": "x"}', "trainer_state.json"),
        ("trainer_state.json", '{"global_', "trainer_state.json"),
        ("optimizer.pt", "", "optimizer.pt: cut or damaged"),
    ],
)
def test_the_program_refuses_it_before_it_loads_anything(checkpoint, name, content, message):
    settings = {"max_steps": 5, "num_train_epochs": 3.0, "world_size": 1}
    settings |= {"deepspeed_plugin": None, "fsdp_plugin_args": None}
    args = SimpleNamespace(resume_from_checkpoint=str(checkpoint), output_dir=str(checkpoint.parent), **settings)
    assert find_checkpoint(args) == (str(checkpoint), 1)
    (checkpoint / name).write_text(content)
    with pytest.raises(UserError, match=message):
        find_checkpoint(args)


def test_so_does_a_trainer_of_a_notebook(make_trainer, checkpoint):
    DAMAGES["cut in half"](checkpoint / "optimizer.pt")
    trainer = make_trainer(max_steps=2)
    with pytest.raises(UserError, match="optimizer.pt: cut or damaged"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0
