"""Runs that end early: with one message at a user's mistake, at a loss that is not a number, after a dry run."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import FalconMambaConfig

from tests.helpers import FULL, ROOT, TIMEOUT, Outcome, environment_of, needs_full_disk, run_programs, tiny_run

pytestmark = pytest.mark.launch

# {what is wrong: (flags, what the message says)}; MODELS stands for a directory with broken models
MISTAKES = {
    "missing files": (["--data_files", "no1.jsonl", "no2.jsonl"], ["no1.jsonl: no such file", "no2.jsonl"]),
    "missing model": (["--model_name_or_path", "no/such/model"], ["--model_name_or_path no/such/model"]),
    "missing model in a directory": (["--model_name_or_path", "tests/nope"], ["tests/nope: no such directory"]),
    "hub name without owner": (["--model_name_or_path", "no-such"], ["no-such: its tokenizer can't be loaded"]),
    "not a model": (["--model_name_or_path", "tests"], ["--model_name_or_path tests: its tokenizer can't be loaded"]),
    "no checkpoint": (["--resume_from_checkpoint", "last"], ["no checkpoint in"]),
    "not a checkpoint": (["--resume_from_checkpoint", "tests"], ["tests: not a whole checkpoint"]),
    "checkpoint of the model alone": (
        ["--resume_from_checkpoint", "MODELS/checkpoint-1"],
        ["--model_name_or_path MODELS/checkpoint-1"],
    ),
    "strict attention": (["--attn_implementation", "flash_attention_2", "--attn_strict", "True"], ["--attn_strict"]),
    "attention": (["--attn_implementation", "flashy"], ["the model can't be loaded", "flashy"]),
    "no output": (["--output_dir", "/proc/x"], ["--output_dir /proc/x can't be made"]),
    "no template": (["--chat_template", "no.jinja"], ["--chat_template no.jinja can't be read"]),
    # a configuration is enough to know that recurrent layers carry one row into the next
    "documents that would leak": (
        ["--model_name_or_path", "MODELS/recurrent", "--batching", "packed"],
        ["--batching packed: FalconMamba has recurrent layers", "use --batching padded"],
    ),
}
OTHERS = {
    "dry run": ["--dry_run", "True"],
    "loss that is not a number": ["--model_name_or_path", "MODELS/not-a-number"],
    "full disk": [],
}
RECORDS = (
    *("data_report.html", "data_report.json", "rejected.jsonl", "run.json", "train_distributed.log"),
    *("train_log.jsonl", "training_args.json", "training_curves.png"),
)


def make_broken_models(tiny_model: Path, directory: Path) -> None:
    """Copies of the tiny model, each with something wrong."""
    for name in ("checkpoint-1", "recurrent", "not-a-number"):
        shutil.copytree(tiny_model, directory / name)
    (directory / "checkpoint-1" / "trainer_state.json").write_text("{}")
    recurrent = FalconMambaConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1)
    recurrent.save_pretrained(directory / "recurrent")
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, directory / "not-a-number" / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make_broken_models(tiny_model, directory)
    return directory


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    """Where each run has a directory of its name."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def outcomes(models, tiny_model, chat_file, output_dir, tmp_path_factory) -> dict[str, Outcome]:
    """How the runs with a mistake end, and those of OTHERS."""
    (output_dir / "full disk").mkdir()
    for name in RECORDS:
        (output_dir / "full disk" / name).symlink_to(FULL)
    commands = {}
    for name, flags in ({name: flags for name, (flags, _) in MISTAKES.items()} | OTHERS).items():
        words = ["train_dft.py", *tiny_run(tiny_model, chat_file, output_dir / name), *flags]
        commands[name] = [str(word).replace("MODELS", str(models)) for word in words]
    return run_programs(commands, tmp_path_factory.mktemp("outcomes"))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_status_2_and_names_the_value_and_the_remedy(outcomes, models, name):
    outcome = outcomes[name]
    assert outcome.status == 2, outcome.output
    for message in MISTAKES[name][1]:
        assert message.replace("MODELS", str(models)) in outcome.output
    assert "Traceback" not in outcome.output


def test_a_dry_run_shows_the_data_and_loads_no_model(outcomes, output_dir):
    outcome = outcomes["dry run"]
    assert outcome.status == 0, outcome.output
    assert "[[" in outcome.output
    assert "chats.jsonl" in outcome.output
    assert "Model: " not in outcome.output
    assert str(output_dir / "dry run" / "data_report.html") in outcome.output
    assert {path.name for path in (output_dir / "dry run").iterdir()} == {
        "data_report.html",
        "data_report.json",
        "rejected.jsonl",
        "train_distributed.log",
    }


def test_a_loss_that_is_not_a_number_is_status_1_and_names_the_rows(outcomes, chat_file):
    outcome = outcomes["loss that is not a number"]
    assert outcome.status == 1, outcome.output
    assert "FloatingPointError: the loss is NaN or infinite in step 1. The rows of its batch: " in outcome.output
    assert f"{chat_file}:" in outcome.output.split("The rows of its batch: ")[1]


@needs_full_disk
def test_records_that_cannot_be_written_are_warned_of_once_and_do_not_end_the_run(outcomes, output_dir):
    outcome, out = outcomes["full disk"], output_dir / "full disk"
    assert outcome.status == 0, outcome.output
    warned = [line for line in outcome.output.splitlines() if "can't be written (No space left on device)" in line]
    for name in RECORDS:
        # copying nothing to a full disk succeeds, and no row was rejected
        assert sum(f"{out / name} can't" in line for line in warned) == (name != "rejected.jsonl"), name
    assert (out / "model.safetensors").stat().st_size > 0
    assert "Traceback" not in outcome.output


# ---- under launchers ----------------------------------------------------------------------------


def test_a_mistake_in_the_data_ends_all_ranks_with_one_message(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    result = train("--data_files", bad, expect=2, LAUNCHER="deepspeed")
    errors = [text for text in result.stdout.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert f"{bad}:1: broken JSON" in result.stdout
    assert "Traceback" not in result.stdout
    assert "Model: " not in result.stdout


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        ("torchrun", ["--report_to", "swanlap"], "--report_to: unknown tracker swanlap; did you mean swanlab?"),
        ("accelerate", ["--logging_dir", "/proc/x"], "--logging_dir /proc/x can't be made: No such file or directory"),
    ],
)
def test_a_mistake_is_status_2_on_all_ranks_under_every_launcher(train, launcher, flags, message):
    result = train(*flags, expect=2, LAUNCHER=launcher)
    errors = [text for text in result.stdout.splitlines() if text.startswith("error: ")]
    assert errors == [f"error: {message}"]
    assert "once_per_node" not in result.stdout


def test_other_ranks_wait_for_the_message_of_rank_0():
    """The launcher ends all ranks when one has ended. A rank that nothing ends tells the mistake itself at last."""
    script = "import dft.program as p; p.ERROR_GRACE_SECONDS = 2.0\nwith p.program():\n    raise p.UserError('wrong')"
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment_of(RANK=1),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT,
    )
    assert (result.returncode, result.stderr) == (2, "error: wrong\n")
    assert time.monotonic() - start > 2.0
