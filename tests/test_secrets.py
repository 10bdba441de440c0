"""Tokens and keys are in nothing that a run prints, logs, sends to trackers or saves."""

import os
import sys

import pytest

import train_dft
from dft.config.training import DFTTrainingArguments
from dft.secrets import is_secret, without_secrets
from tests.helpers import run, tiny_run

TOKEN, KEY = "hf_canarytoken", "canarykey"


@pytest.mark.parametrize("name", ["--hub_token", "--hub-token", "WANDB_API_KEY", "my_password_file", "client_secret"])
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["--max_tokens_per_batch", "--dft_special_tokens", "monkey", "tokenizer"])
def test_names_of_what_is_none(name):
    assert not is_secret(name)


def test_secrets_of_a_command_line_are_hidden():
    words = ["--hub_token", TOKEN, f"--hub-token={TOKEN}", "--my_api_key", KEY, "--data_files", "a_key"]
    hidden = ["--hub_token", "HIDDEN", "--hub-token=HIDDEN", "--my_api_key", "HIDDEN", "--data_files", "a_key"]
    assert without_secrets(words) == hidden


def test_a_run_tells_nobody_its_tokens(tiny_model, chat_file, tmp_path, monkeypatch, capfd):
    words = [*map(str, tiny_run(tiny_model, chat_file, tmp_path / "out")), "--save_steps", "1", "--hub_token", TOKEN]
    monkeypatch.setattr(sys, "argv", ["train_dft.py", *words, "--report_to", "tensorboard"])
    for name in ("WANDB_API_KEY", "SWANLAB_API_KEY"):
        monkeypatch.setenv(name, KEY)
    train_dft.main()
    assert os.environ["HF_TOKEN"] == TOKEN  # where the hub's library looks for it
    assert TOKEN not in " ".join(sys.argv)  # which trackers record
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"run.json", "train_log.jsonl", "trainer_state.json", "README.md"} <= {path.name for path in files}
    assert not [path for path in files if path.name == "training_args.bin"]
    told = [str(path) for path in files if any(text in path.read_bytes() for text in (TOKEN.encode(), KEY.encode()))]
    assert not told
    output = "".join(capfd.readouterr())
    assert "Done: 2 steps" in output
    assert TOKEN not in output
    assert KEY not in output


def test_training_arguments_hold_no_token(tmp_path):
    args = DFTTrainingArguments(str(tmp_path), hub_token=TOKEN, use_cpu=True)
    assert TOKEN not in repr(vars(args)) + args.to_json_string()


@pytest.mark.parametrize("flags", [["--hub_token", TOKEN], [f"--hub-token={TOKEN}"]])
def test_the_launch_script_passes_the_token_on_unseen(flags, tmp_path):
    """A stand-in for the launcher prints what it is called with, as DeepSpeed does."""
    stub = tmp_path / "bin" / "deepspeed"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "CALL $@"\ntest "$HF_TOKEN" = ' + TOKEN + ' && echo 0 > "$DFT_RUN_DIR/status"\n')
    stub.chmod(0o755)
    settings = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "LOG_FILE": tmp_path / "log", "NPROC": 1}
    result = run(["bash", "scripts/train.sh", *flags, "--seed", "1"], DS_CONFIG="", **settings)
    assert result.returncode == 0
    assert "--seed 1" in result.stdout
    assert TOKEN not in result.stdout + (tmp_path / "log").read_text()


@pytest.mark.parametrize("script", ["scripts/train.sh", "scripts/finetune.sh"])
@pytest.mark.parametrize("flags", [["--wandb_api_key", KEY], [f"--my-password={KEY}"], ["--hub_token"]])
def test_other_secrets_on_the_command_line_are_refused_unseen(script, flags, tmp_path):
    result = run(["bash", script, *flags], LOG_FILE=tmp_path / "log", MODEL="m", TRAIN="t")
    assert result.returncode == 2
    assert "error: " + flags[0].split("=")[0] in result.stdout
    assert KEY not in result.stdout
