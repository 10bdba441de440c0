"""The initial model of MoDS is trained once for a seed set, goes on after a failure, and replaces no other."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from data_utils import load_conversations
from dft.errors import UserError
from dft.selection import mods_training
from dft.selection.model_flags import ModelFlags
from dft.selection.mods_training import SeedTraining


@pytest.fixture
def conversations(chat_file):
    return list(load_conversations([str(chat_file)]))


def fake_training(status: int, started: list):
    """Stands for scripts/train.sh: writes a model, or ends with another status."""

    def run(command, env, check):
        started.append((command, env))
        output = Path(command[command.index("--output_dir") + 1])
        (output / "checkpoint-2").mkdir(parents=True, exist_ok=True)
        (output / "checkpoint-2" / "manifest.json").touch()
        (output / "config.json").touch()
        return subprocess.CompletedProcess(command, status)

    return run


@pytest.fixture
def training(tiny_model, conversations, tmp_path) -> SeedTraining:
    found = SeedTraining(ModelFlags(tiny_model), tmp_path / "work", ["--max_steps", "2"])
    found.write_seeds(conversations[:3])
    return found


def test_the_model_is_trained_once_for_a_seed_set(training, conversations, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "run", fake_training(0, started))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("BACKGROUND", "1")
    for _ in range(2):
        assert training.trained_model().directory == training.model
    ((command, env),) = started
    assert command[-2:] == ["--max_steps", "2"]
    assert "--resume_from_checkpoint" not in command
    assert "RANK" not in env
    assert env["BACKGROUND"] == "0"
    assert env["LOG_FILE"] == str(training.log)
    with pytest.raises(UserError, match="trained on another seed set, from another model or with other"):
        replace(training, flags=["--max_steps", "3"]).trained_model()
    training.write_seeds(conversations[:4])
    with pytest.raises(UserError, match="trained on another seed set"):
        training.trained_model()


def test_a_training_that_fails_names_its_log_and_is_resumed(training, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "run", fake_training(1, started))
    with pytest.raises(UserError, match=r"ended with status 1: .*train\.log says why"):
        training.trained_model()
    monkeypatch.setattr(subprocess, "run", fake_training(0, started))
    training.trained_model()
    assert "--resume_from_checkpoint" not in started[0][0]
    assert "--resume_from_checkpoint" in started[1][0]


def test_what_mods_has_not_trained_is_left_alone(training):
    training.model.mkdir()
    (training.model / "config.json").touch()
    with pytest.raises(UserError, match="holds what mods has not trained"):
        training.trained_model()


def test_rows_of_the_work_directory_are_not_selected_from(training):
    with pytest.raises(UserError, match=r"--work_dir .* holds .*seed\.jsonl"):
        training.check_outside(list(load_conversations([str(training.seed_file)])))


def test_flags_that_can_not_be_used_are_refused(training, monkeypatch):
    with pytest.raises(UserError, match=r"--train_flags --output-dir: mods gives .*--output_dir itself"):
        replace(training, flags=["--output-dir=x"])
    with pytest.raises(UserError, match="--train_flags --hub_token: give keys by the environment"):
        replace(training, flags=["--hub_token", "x"])
    monkeypatch.setattr(mods_training, "PROJECT", Path("/nowhere"))
    with pytest.raises(UserError, match="isn't beside the package"):
        replace(training, flags=["--bf16", "True"])


def test_the_commands_that_go_on_can_be_pasted(tmp_path):
    training = SeedTraining(ModelFlags(tmp_path), tmp_path / "my work")
    words = shlex.split(training.how_to_go_on())
    assert words[words.index("--initial_model") + 1] == f"{training.model},"
    assert words[words.index("--output_dir") + 1] == str(training.model)
