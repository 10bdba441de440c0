"""scripts/estimate_memory.py prints settings that fit and a command that the program takes, and refuses bad input."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dft.config.command_line import Settings, parse_args
from dft.errors import UserError
from scripts.estimate_memory import FILES, Setting, main
from tests.helpers import ROOT, environment_of

SMALL = ["--gpu_memory", "24", "--max_length", "64"]


def lines_of(text: str) -> list[list[str]]:
    """The cells of the table's lines that hold numbers."""
    return [re.split(r"\s{2,}", line) for line in text.splitlines() if line.endswith((" yes", " no"))]


@pytest.fixture
def estimate(tiny_model, capsys):
    """Runs the script on the tiny model, and returns what it prints."""

    def run(*flags: str) -> str:
        main([str(tiny_model), *SMALL, *flags])
        return capsys.readouterr().out

    return run


def test_all_settings_are_listed(estimate):
    lines = lines_of(estimate("--gpus", "2"))
    assert len(lines) == 2 * len(FILES)
    assert {line[-1] for line in lines} == {"yes"}
    assert all((ROOT / "ds_config" / name).is_file() for name in FILES.values() if name)


def parsed(text: str, output_dir: Path) -> tuple[dict[str, str], Settings]:
    """The variables of the command that is printed, and what train_dft.py makes of its flags."""
    words = shlex.split(text[text.index("MODEL=") :].replace("\\\n", ""))
    variables = dict(word.split("=", 1) for word in words[: words.index("bash")])
    flags = words[words.index("scripts/train.sh") + 1 :]
    files = ["--model_name_or_path", variables["MODEL"], "--data_files", variables["DATA"]]
    return variables, parse_args([*files, "--output_dir", str(output_dir), *flags])


def test_the_command_is_one_that_the_program_takes(estimate, tmp_path):
    """The flags are parsed as train_dft.py parses them, and the variables are those of train.sh."""
    text = estimate("--gpus", "2", "--zero_stage", "2", "--per_device_train_batch_size", "3", "--offload", "none")
    variables, settings = parsed(text, tmp_path)
    assert variables["DS_CONFIG"] == "ds_config/zero2.json"
    assert (variables["LAUNCHER"], variables["NPROC"]) == ("deepspeed", "2")
    script = (ROOT / "scripts" / "train.sh").read_text()
    assert all(f"#     {name}" in script or f"{name}," in script for name in ("LAUNCHER", "NPROC", "DS_CONFIG"))
    assert settings.data.max_length == 64
    assert settings.training.per_device_train_batch_size == 3
    assert settings.training.bf16
    assert not settings.training.activation_checkpointing
    assert settings.model.torch_dtype == "bfloat16"


@pytest.mark.parametrize(("gpus", "launcher"), [("1", "python"), ("2", "torchrun")])
def test_without_deepspeed_weights_stay_in_32_bits(estimate, gpus, launcher):
    text = estimate("--gpus", gpus)
    assert f"LAUNCHER={launcher} NPROC={gpus} DS_CONFIG= " in text
    assert "--torch_dtype float32 --bf16 True" in text


def test_the_cheapest_setting_is_the_fastest():
    """Offloading costs the most, then recomputation, then stages."""
    expected = [
        Setting(0, "none", False),
        Setting(3, "none", False),
        Setting(0, "none", True),
        Setting(3, "none", True),
        Setting(2, "optimizer", False),
        Setting(3, "all", False),
    ]
    given = expected[::-1]
    assert sorted(given, key=lambda setting: setting.cost) == expected


def test_where_nothing_fits_it_says_what_would_help(estimate):
    text = estimate("--gpu_memory", "1.001", "--per_device_train_batch_size", "8", "--zero_stage", "0")
    assert {line[-1] for line in lines_of(text)} == {"no"}
    assert "Nothing fits. no ZeRO, with recomputation needs 1.0 GiB" in text
    for change in (
        "--gpus 2",
        "--per_device_train_batch_size 1",
        "--max_length 32",
        "--method lora",
        "--method qlora",
    ):
        assert f"with {change}: 1.0 GiB" in text
    assert "bash" not in text


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_command_trains_adapters_if_they_are_asked_for(estimate, tmp_path, method):
    text = estimate("--method", method, "--zero_stage", "0", *([] if method == "full" else ["--lora_r", "8"]))
    _, settings = parsed(text, tmp_path)
    assert settings.adapters.use_peft == (method != "full")
    assert settings.adapters.load_in_4bit == (method == "qlora")
    assert method == "full" or (settings.adapters.lora_r, settings.training.learning_rate) == (8, 2e-4)


def test_gpus_that_share_a_row_have_a_part_of_its_tokens(estimate):
    half = estimate("--gpus", "2", "--sequence_parallel_size", "2", "--max_length", "100000")
    alone = estimate("--gpus", "2", "--max_length", "50000")
    assert "1 x 100,000 tokens on each 2 of 2 GPUs" in half
    assert lines_of(half) == lines_of(alone)
    assert "--max_length 100000 " in half
    assert half.endswith("--sequence_parallel_size 2\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "4", "--sequence_parallel_size", "3"], "is 3; it must divide the 4 of --gpus"),
        (["--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--gpu_memory", "-1"], "--gpu_memory is -1.0; it must be above 0"),
        (["--gpu_memory", "nan"], "--gpu_memory is nan; it must be above 0"),
        (["--supervised", "0"], "--supervised is 0.0; it must be above 0"),
        (["--loss_chunk_mb", "0"], "--loss_chunk_mb is 0.0; it must be above 0"),
        (["--zero_stage", "1", "--offload", "optimizer"], "stages 2 and 3 offload the optimizer"),
    ],
)
def test_bad_input_is_refused(estimate, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        estimate(*flags)


def test_without_a_gpu_its_memory_must_be_given(tiny_model):
    with pytest.raises(UserError, match="give the GiB of one with --gpu_memory"):
        main([str(tiny_model)])


@pytest.mark.launch
def test_a_mistake_ends_with_status_2_and_one_message(tmp_path):
    command = [sys.executable, "scripts/estimate_memory.py", str(tmp_path), *SMALL]
    result = subprocess.run(command, cwd=ROOT, env=environment_of(), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: --model_name_or_path {tmp_path}: its configuration can't be loaded")
