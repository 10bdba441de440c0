"""The command lines of the documents that this project reproduces run as written, apart from paths and GPUs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dft.distributed import free_port
from tests.helpers import read_log, run, write_jsonl

pytestmark = pytest.mark.launch


@pytest.fixture
def two_files(tmp_path, chat_file):
    rows = [json.loads(text) for text in chat_file.read_text().splitlines()]
    return write_jsonl(tmp_path / "part1.json", rows[:20]), write_jsonl(tmp_path / "part2.json", rows[20:])


COMMON = (
    "--torch_dtype bfloat16 --attn_implementation flash_attention_2 --trust_remote_code True "
    "--preprocessing_num_workers 8 --enable_gradient_checkpointing True --bf16 True --lr_scheduler_type cosine "
    "--weight_decay 0.01 --save_total_limit 3 --report_to swanlab --logging_steps 10 --remove_unused_columns False "
    "--ddp_find_unused_parameters False --deepspeed ./ds_config/zero3.json"
).split()
README_FLAGS = (
    "--max_length 8192 --validation_split_percentage 2.0 --dft_alpha 0.7 --num_train_epochs 1 "
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --learning_rate 2e-6 "
    "--gradient_accumulation_steps 16 --eval_strategy steps --eval_steps 200 --save_strategy steps --save_steps 200 "
    "--save_only_model True --warmup_ratio 0.05"
).split()
REPOSITORY_FLAGS = (
    "--max_length 8800 --validation_split_percentage 2.0 --debug_data_processing True --dft_alpha 0.8 "
    "--reduce_logging True --log_metrics_steps 10 --num_train_epochs 2 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2 --learning_rate 1e-6 --gradient_accumulation_steps 8 --eval_steps 500 "
    "--save_steps 500 --save_only_model 1 --warmup_ratio 0.1 --dataloader_num_workers 8 --save_safetensors True "
    "--disable_tqdm False --max_eval_samples 1000 --use_simple_dft True"
).split()


@pytest.mark.parametrize("flags", [README_FLAGS, REPOSITORY_FLAGS], ids=["readme", "repository"])
def test_the_deepspeed_command_lines_train_and_save_bfloat16(flags, tiny_model, two_files, tmp_path):
    places = ("--model_name_or_path", tiny_model, "--data_files", *two_files, "--output_dir", tmp_path / "out")
    # the port is another than the default, which a run beside this one may have
    launcher = ["deepspeed", "--num_gpus=2", "--master_port", free_port(), "train_dft.py"]
    command = [*launcher, *COMMON, *flags, *places, "--logging_dir", tmp_path / "logs"]
    result = run([*command, "--max_steps", 2, "--logging_steps", 1], SWANLAB_API_KEY="")
    assert result.returncode == 0, result.stdout[-5000:]
    assert "flash_attention_2 needs" in result.stdout  # said, not done in silence
    assert "swanlab sync" in result.stdout
    records = [r for r in read_log(tmp_path / "out") if "ce_loss" in r]
    step = int(flags[flags.index("--log_metrics_steps") + 1]) if "--log_metrics_steps" in flags else 1
    assert [r["step"] for r in records] == ([1, 2] if step == 1 else [2])
    assert list((tmp_path / "out" / "swanlog").iterdir())
    assert (tmp_path / "logs" / "train_distributed.log").is_file()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 and t.numel() for t in saved.values())


def test_the_accelerate_command_line_trains_on_two_processes(tiny_model, two_files, tmp_path):
    env = {"MODEL": tiny_model, "TRAIN": two_files[0], "EVAL": two_files[1], "OUTPUT_DIR": tmp_path / "out"}
    result = run(["bash", "scripts/finetune.sh", "--max_steps", 2, "--disable_tqdm", "True"], **env)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "[RANK 0/2]" in result.stdout
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert [(f["path"], f["kept"]) for f in report["files"]] == [(str(path), 20) for path in two_files]
    assert all(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())
