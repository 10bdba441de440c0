"""Which checkpoint a run goes on from, and with which learning rate; and a run that has nothing left to train."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dft.checkpoints.manifest import read_manifests, write_manifest
from dft.checkpoints.resume import find_checkpoint
from dft.errors import UserError
from dft.tracking.results import save_run
from tests.checkpoints.test_manifest import flip
from tests.helpers import flat_weights

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 1e-2}


def found(output_dir: Path, wanted: str = "last", **flags) -> tuple[str, int]:
    """The name and step of the checkpoint that a run goes on from."""
    run = {"max_steps": 9, "num_train_epochs": 3.0, "world_size": 1} | flags
    run |= {"deepspeed_plugin": None, "fsdp_plugin_args": None}
    path, step = find_checkpoint(SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(output_dir), **run))
    return Path(path).name, step


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output directory of three steps."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(make_trainer, trained, tmp_path) -> Path:
    """A copy of it."""
    if not any(trained.iterdir()):
        make_trainer(**SETTINGS, output_dir=str(trained)).train()
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_last_is_the_newest_checkpoint_that_is_whole(run, caplog):
    assert found(run) == ("checkpoint-3", 3)
    assert "Passed over" not in caplog.text
    flip(run / "checkpoint-3" / "optimizer.pt")
    assert found(run) == ("checkpoint-2", 2)
    (run / "checkpoint-2" / "scheduler.pt").unlink()
    caplog.clear()
    assert found(run) == ("checkpoint-1", 1)
    passed_over = [record.message for record in caplog.records if "Passed over" in record.message]
    assert len(passed_over) == 1
    assert f"{run}/checkpoint-3/optimizer.pt: damaged" in passed_over[0]
    assert f"{run}/checkpoint-2/scheduler.pt: missing" in passed_over[0]
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(UserError) as caught:
        found(run)
    for line in ("no run can go on from any checkpoint", "checkpoint-3/optimizer.pt", "checkpoint-2/scheduler.pt"):
        assert line in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth", "config.json"])
def test_a_checkpoint_that_is_named_is_refused_where_a_file_is_missing(run, name):
    (run / "checkpoint-2" / name).unlink()
    with pytest.raises(UserError, match=f"not a whole checkpoint\n.*checkpoint-2/{name}: missing"):
        found(run, str(run / "checkpoint-2"))


def test_an_older_one_by_its_name_is_said_to_be_older(run, caplog):
    assert found(run, str(run / "checkpoint-2")) == ("checkpoint-2", 2)
    assert "isn't the newest: beside it is checkpoint-3" in caplog.text
    caplog.clear()
    assert found(run, str(run / "checkpoint-3")) == ("checkpoint-3", 3)
    assert not caplog.text


def test_without_a_manifest_it_is_taken_by_name_or_where_nothing_is_better(run, caplog):
    (run / "checkpoint-3" / "manifest.json").unlink()
    assert found(run, str(run / "checkpoint-3")) == ("checkpoint-3", 3)
    assert "checkpoint-3 has no manifest.json" in caplog.text
    assert found(run) == ("checkpoint-2", 2)
    assert f"Passed over:\n{run}/checkpoint-3: it has no manifest.json" in caplog.text
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    caplog.clear()
    assert found(run) == ("checkpoint-3", 3)
    assert "checkpoint-3 has no manifest.json" in caplog.text


def test_checkpoints_of_the_model_alone_are_passed_over(run, caplog):
    path = run / "checkpoint-3" / "manifest.json"
    content = read_manifests(path.parent)[path.name]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path.parent / name).unlink()
        del content["files"][name]
    write_manifest(path, content)
    assert found(run) == ("checkpoint-2", 2)
    assert "holds the model alone" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_steps": 2}, "at step 3 and epoch 1.5, beyond --max_steps 2"),
        ({"max_steps": -1, "num_train_epochs": 0.5}, "at step 3 and epoch 1.5, beyond --num_train_epochs 0.5"),
    ],
)
def test_a_checkpoint_beyond_the_end_is_refused(run, flags, message):
    with pytest.raises(UserError, match=message):
        found(run, **flags)
    assert found(run, **{name: value + 1 for name, value in flags.items()}) == ("checkpoint-3", 3)


def test_a_trainer_of_a_notebook_takes_the_newest_that_is_whole(make_trainer, run):
    flip(run / "checkpoint-3" / "model.safetensors")
    trainer = make_trainer(**SETTINGS, output_dir=str(run))
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2
    whole = make_trainer(**SETTINGS, output_dir=str(run.parent / "whole"))
    whole.train()
    assert torch.equal(flat_weights(trainer.model), flat_weights(whole.model))


def test_where_nothing_is_left_to_train_the_final_model_is_that_of_the_checkpoint(make_trainer, run, caplog):
    caplog.set_level("INFO")
    assert found(run, max_steps=3) == ("checkpoint-3", 3)
    assert "Nothing is left to train" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in run.glob("checkpoint-*/*")}
    trainer = make_trainer(**SETTINGS, output_dir=str(run))
    save_run(trainer, trainer.train(resume_from_checkpoint=str(run / "checkpoint-3")).metrics)
    assert trainer.state.global_step == 3
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, run / "checkpoint-3"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoint-*/*")} == before
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 3


def test_a_process_without_a_random_state_gets_one_of_its_own(make_trainer, run, monkeypatch):
    trainer = make_trainer(**SETTINGS, output_dir=str(run))
    rank = 0
    monkeypatch.setattr(type(trainer.args), "process_index", property(lambda args: rank))
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda args: 2))
    (run / "checkpoint-2" / "rng_state.pth").rename(run / "checkpoint-2" / "rng_state_0.pth")
    drawn = []
    for number in (0, 0, 1, 1, 2):
        rank = number
        torch.manual_seed(len(drawn))
        trainer._load_rng_state(str(run / "checkpoint-2"))
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3] != drawn[4]
    trainer.state.global_step = 9
    rank = 1
    trainer._load_rng_state(str(run / "checkpoint-2"))
    assert float(torch.rand(())) != drawn[2]


# ---- the learning rate --------------------------------------------------------------------------


def rates(trainer) -> list[float]:
    """The learning rate of each step."""
    return [record["learning_rate"] for record in trainer.state.log_history if "learning_rate" in record]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learning_rate": 1e-3},
        {"lr_scheduler_type": "cosine"},
        {"max_steps": 8},
        {"learning_rate": 5e-2, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
        {"weight_decay": 0.1},
    ],
)
def test_the_rate_is_that_of_the_flags_from_the_next_step_on(make_trainer, run, flags):
    """As in a run that had these flags from its start; the optimizer's other settings are the checkpoint's."""
    settings = SETTINGS | {"max_steps": 5, "logging_steps": 1, "output_dir": str(run)} | flags
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    fresh = make_trainer(**settings | {"output_dir": str(run.parent / "fresh"), "save_strategy": "no"})
    fresh.train()
    assert rates(resumed)[2:] == pytest.approx(rates(fresh)[2:])
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.0}
