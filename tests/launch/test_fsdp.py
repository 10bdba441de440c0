"""Checkpoints under FSDP2, whole or in shards, and the saved model; gradients are in test_invariance.py."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dft.checkpoints.integrity import check_complete, check_whole
from dft.config.fsdp import STATE_DICTS
from dft.errors import UserError
from tests.helpers import run_on

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Directory with what fsdp_worker.py leaves."""
    directory = tmp_path_factory.mktemp("fsdp")
    run_on(2, "tests/launch/fsdp_worker.py", directory)
    return directory


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_the_saved_model_is_the_trained_one(runs, kind):
    """Its head is tied, and written once."""
    trained = torch.load(runs / kind / "whole" / "trained.pt")
    saved = load_file(runs / kind / "whole" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(runs / kind / "whole", dtype=torch.float32)
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
    assert all(torch.equal(weight, trained[name]) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize("kind", STATE_DICTS)
def test_resumed_equals_uninterrupted_bit_for_bit(runs, kind):
    whole, resumed = (load_file(runs / kind / name / "model.safetensors") for name in ("whole", "resumed"))
    before = load_file(runs / kind / "whole" / "checkpoint-1" / "model.safetensors")
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
        assert not torch.equal(before[name], weight), name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("FULL_STATE_DICT", "pytorch_model_fsdp.bin"),
        ("FULL_STATE_DICT", "optimizer.bin"),
        ("SHARDED_STATE_DICT", "pytorch_model_fsdp_0/__1_0.distcp"),
        ("SHARDED_STATE_DICT", "optimizer_0/__0_0.distcp"),
        ("SHARDED_STATE_DICT", "optimizer_0/.metadata"),
    ],
)
def test_damaged_and_missing_files_are_found(runs, tmp_path, kind, name):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(runs / kind / "whole" / "checkpoint-1", checkpoint)
    (checkpoint / "manifest.json").unlink()  # without which the formats of the files tell
    check_whole(checkpoint)
    check_complete(checkpoint)
    path = checkpoint / name
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:-3], content[:middle], bytes(len(content)), content[:middle] + bytes(999)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.parent.name}.*damaged"):
            check_whole(checkpoint)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.parent.name}.*missing"):
        (check_whole if path.suffix == ".distcp" else check_complete)(checkpoint)
