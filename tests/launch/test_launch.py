"""The program as people start it: launchers, ZeRO-3, checkpoints, resuming, trackers, mistakes."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconMambaConfig

from tests.helpers import ROOT, read_log, run, write_jsonl

pytestmark = pytest.mark.launch

ZERO3 = {"LAUNCHER": "deepspeed", "NPROC": "2"}


def logits_of(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(torch.arange(5, 25)[None]).logits


# ---- what a run leaves --------------------------------------------------------------------------


def test_zero3_leaves_a_whole_model(train, tiny_model, tmp_path):
    flags = ("--dft_alpha", 0.7, "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 1, "--fused_loss", "on")
    shared_memory = set(Path("/dev/shm").glob("deepspeed_*"))
    result = train(*flags, "--save_only_model", 1, "--learning_rate", 1e-2, "--report_to", "tensorboard", **ZERO3)
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= shared_memory
    out = tmp_path / "out"
    original = load_file(tiny_model / "model.safetensors")
    saved = load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in original.items()}
    assert all(t.numel() and not torch.equal(t, original[n]) for n, t in saved.items())

    # the last checkpoint and the final model are one and the same, and generate in the chat's template
    checkpoints = sorted(out.glob("checkpoint-*"))
    torch.testing.assert_close(logits_of(checkpoints[-1]), logits_of(out), rtol=0, atol=0)
    assert not (checkpoints[-1] / "optimizer.pt").exists()
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"

    files = {path.name for path in out.iterdir()}
    assert files >= {
        *("train_log.jsonl", "training_curves.png", "all_results.json", "trainer_state.json", "training_args.json"),
        *("data_report.json", "data_report.html", "rejected.jsonl", "train_distributed.log", "runs"),
    }
    assert not {"training_args.bin", "tokenized"} & files  # no pickle, nothing left over

    records = read_log(out)
    training = [r for r in records if "ce_loss" in r]
    assert [r["step"] for r in training] == [1, 2]
    for record in training:
        assert record["train/dft_alpha"] == 0.7
        assert record["loss"] < record["ce_loss"]
        assert 0 < record["train/avg_p_correct"] < 1
        assert record["tokens_per_second"] > record["supervised_tokens_per_second"] > 0
        assert record["memory_gib"] > 0
    evaluation = json.loads((out / "all_results.json").read_text())
    assert evaluation["eval_perplexity"] == pytest.approx(2.718281828 ** evaluation["eval_ce_loss"])
    assert "Done: 2 steps" in result.stdout
    assert "Loss: the head is fused with the loss" in result.stdout


def test_resumed_equals_uninterrupted_bit_for_bit(train, tmp_path):
    """In the middle of the second epoch, whose order is another than the first's."""
    flags = ("--max_steps", 4, "--save_steps", 3, "--learning_rate", 1e-2, "--gradient_accumulation_steps", 2)
    flags += ("--dft_alpha_warmup_ratio", 1.0, "--loss_normalization", "turn", "--dft_special_tokens", "ce")
    flags += ("--batching", "packed", "--max_length", 512, "--per_device_train_batch_size", 1)
    train(*flags, **ZERO3)
    whole = tmp_path / "whole"
    (tmp_path / "out").rename(whole)
    report = json.loads((whole / "data_report.json").read_text())
    assert report["total"]["steps_per_epoch"] == 2
    train(*flags, "--resume_from_checkpoint", whole / "checkpoint-3", **ZERO3)
    resumed = tmp_path / "out"
    ours, theirs = (load_file(d / "model.safetensors") for d in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    timing = ("tokens_per_second", "supervised_tokens_per_second", "memory_gib")

    def losses(directory):
        records = [r for r in read_log(directory) if "ce_loss" in r and r["step"] > 3]
        return [{k: v for k, v in r.items() if k not in timing} for r in records]

    assert losses(resumed) == losses(whole)
    assert [record["train/dft_alpha"] for record in losses(whole)] == [0.75]

    # `last` finds the newest checkpoint of the output directory, and there is nothing left to do
    result = train(*flags, "--resume_from_checkpoint", "last", expect=2)
    assert "checkpoint-4: nothing is left to train, it is at step 4" in result.stdout


def test_the_best_checkpoint_is_kept(train, chat_file, tmp_path):
    """The first step has a learning rate of 0 and the others ruin the model: the oldest checkpoint is the best."""
    flags = ("--max_steps", 4, "--save_steps", 1, "--save_total_limit", 2, "--warmup_steps", 1, "--learning_rate", 1.0)
    metric = ("--metric_for_best_model", "eval_ce_loss", "--eval_data_files", chat_file)
    result = train(*flags, *metric, "--save_only_model", "True", **ZERO3)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    evaluations = {r["step"]: r["eval_ce_loss"] for r in state["log_history"] if "eval_ce_loss" in r}
    assert min(evaluations, key=evaluations.get) == 1
    assert {p.name for p in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-1"
    assert "checkpoint-1 (" in result.stdout


# ---- the command lines of the documents that this project reproduces ----------------------------


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
def test_the_original_command_lines(flags, tiny_model, two_files, tmp_path):
    places = ("--model_name_or_path", tiny_model, "--data_files", *two_files, "--output_dir", tmp_path / "out")
    command = [
        "deepspeed",
        "--num_gpus=2",
        "train_dft.py",
        *COMMON,
        *flags,
        *places,
        "--logging_dir",
        tmp_path / "logs",
    ]
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


def test_the_accelerate_command_line(tiny_model, two_files, tmp_path):
    env = {"MODEL": tiny_model, "TRAIN": two_files[0], "EVAL": two_files[1], "OUTPUT_DIR": tmp_path / "out"}
    result = run(["bash", "scripts/finetune.sh", "--max_steps", 2, "--disable_tqdm", "True"], **_text(env))
    assert result.returncode == 0, result.stdout[-5000:]
    assert "[RANK 0/2]" in result.stdout
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert [(f["path"], f["kept"]) for f in report["files"]] == [(str(path), 20) for path in two_files]
    assert all(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())


def _text(env: dict) -> dict[str, str]:
    return {key: str(value) for key, value in env.items()}


# ---- launchers and trackers ---------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "python"])
def test_launchers(train, tmp_path, launcher):
    """All give the loss of the deepspeed launcher: see test_invariance for the numbers."""
    processes = 1 if launcher == "python" else 2
    result = train(LAUNCHER=launcher, NPROC=str(processes), OUTPUT_DIR=str(tmp_path / "unused"))
    assert f"[RANK 0/{processes}]" in result.stdout
    assert "Log file: " in result.stdout
    log = next((tmp_path / "logs").glob("train_*.log")).read_text()
    assert "Done: 2 steps" in log
    assert log.startswith("Command: ")


def test_background_returns_at_once(train, tmp_path):
    log = tmp_path / "background.log"
    result = train(BACKGROUND="1", LOG_FILE=str(log))
    assert not (tmp_path / "out" / "model.safetensors").exists()  # it goes on without us
    assert f"tail -f {log}" in result.stdout
    deadline = time.monotonic() + 120
    while "Done: 2 steps" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_trackers_together_and_offline(train, tmp_path):
    flags = ("--report_to", "swanlab,wandb", "tensorboard", "--project", "trial", "--run_name", "first")
    result = train(*flags, SWANLAB_API_KEY="", WANDB_API_KEY="", NPROC="1", HOME=str(tmp_path))
    for sign in ("swanlab sync", "wandb sync"):
        assert sign in result.stdout
    out = tmp_path / "out"
    assert list((out / "swanlog").glob("run-*"))
    assert list((out / "wandb").glob("offline-run-*"))
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    assert set(json.loads((out / "tracker_ids.json").read_text())) == {"swanlab", "wandb", "tensorboard"}
    recorded = b"".join(path.read_bytes() for path in (out / "wandb").glob("offline-run-*/*.wandb"))
    assert b"git_commit" in recorded
    assert b"chats.jsonl" in recorded
    assert "step 2/2  loss " in result.stdout  # a line for each record
    assert "{'loss'" not in result.stdout


def test_ending_the_script_ends_every_rank(tiny_model, chat_file, tmp_path):
    command = ["bash", "scripts/train.sh", "--max_steps", "100000", "--disable_tqdm", "True", "--save_strategy", "no"]
    places = {"MODEL": tiny_model, "DATA": chat_file, "OUTPUT_DIR": tmp_path / "out", "LOG_FILE": tmp_path / "log"}
    env = {**os.environ, **_text(places), **ZERO3, "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}
    script = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = tmp_path / "out" / "train_log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert script.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) != 0
    listing = subprocess.run(["pgrep", "-f", f"train_dft.py.*{tmp_path}"], capture_output=True, text=True)
    assert listing.stdout == ""


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_mistake_in_the_data_ends_all_ranks_with_one_message(train, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    result = train("--data_files", bad, expect=2, **ZERO3)
    errors = [text for text in result.stdout.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert f"{bad}:1: broken JSON" in result.stdout
    assert "Traceback" not in result.stdout
    assert "Model: " not in result.stdout


MISTAKES = {
    "missing files": (["--data_files", "no1.jsonl", "no2.jsonl"], ["no1.jsonl: no such file", "no2.jsonl"]),
    "missing model": (["--model_name_or_path", "no/such/model"], ["--model_name_or_path no/such/model"]),
    "missing model in a directory": (["--model_name_or_path", "tests/nope"], ["tests/nope: no such directory"]),
    "hub name without owner": (["--model_name_or_path", "no-such"], ["no-such: its tokenizer can't be loaded"]),
    "not a model": (["--model_name_or_path", "tests"], ["--model_name_or_path tests: its tokenizer can't be loaded"]),
    "no checkpoint": (["--resume_from_checkpoint", "last"], ["no checkpoint in"]),
    "not a checkpoint": (["--resume_from_checkpoint", "tests"], ["tests: not a whole checkpoint"]),
    "strict attention": (["--attn_implementation", "flash_attention_2", "--attn_strict", "True"], ["--attn_strict"]),
    "attention": (["--attn_implementation", "flashy"], ["the model can't be loaded", "flashy"]),
    "no output": (["--output_dir", "/proc/x"], ["--output_dir /proc/x can't be made"]),
    "no template": (["--chat_template", "no.jinja"], ["--chat_template no.jinja can't be read"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_that_need_the_files(train, name):
    flags, messages = MISTAKES[name]
    result = train(*flags, expect=2)
    for message in messages:
        assert message in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        ("torchrun", ["--report_to", "swanlap"], "--report_to: unknown tracker swanlap; did you mean swanlab?"),
        ("deepspeed", ["--logging_dir", "/proc/x"], "--logging_dir /proc/x can't be made: No such file or directory"),
    ],
)
def test_a_mistake_is_status_2_on_all_ranks_under_every_launcher(train, launcher, flags, message):
    result = train(*flags, expect=2, LAUNCHER=launcher)
    errors = [text for text in result.stdout.splitlines() if text.startswith("error: ")]
    assert errors == [f"error: {message}"]
    assert "once_per_node" not in result.stdout


def test_rank_0_has_the_time_to_say_what_is_wrong():
    """The launcher ends all ranks when one has ended."""
    script = "import process_group as g; g.SECONDS_TO_SAY_IT = 2.0; print('waits', flush=True)\nwith g.program():\n"
    command = [sys.executable, "-c", script + "    raise g.UserError('wrong')"]
    start = time.monotonic()
    result = subprocess.run(command, env=os.environ | {"RANK": "1"}, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (2, "error: wrong")
    assert time.monotonic() - start > 2.0


def test_a_tracker_that_is_missing_is_dropped(train):
    result = train("--report_to", "mlflow", "tensorboard", NPROC="1")
    assert "--report_to mlflow: it can't start, going on without it" in result.stdout


def test_results_are_those_of_the_best_model_where_it_is_loaded(train, chat_file, tmp_path):
    flags = ("--max_steps", 2, "--save_steps", 1, "--warmup_steps", 1, "--learning_rate", 1.0)
    metric = ("--metric_for_best_model", "eval_ce_loss", "--eval_data_files", chat_file)
    train(*flags, *metric, "--load_best_model_at_end", "True", NPROC="1")
    records = [r for r in read_log(tmp_path / "out") if "eval_ce_loss" in r]
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_ce_loss"] == pytest.approx(records[0]["eval_ce_loss"])
    assert results["eval_ce_loss"] < records[1]["eval_ce_loss"]


def test_a_model_only_checkpoint_cannot_be_resumed(train, tiny_model, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(tiny_model, checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    result = train("--resume_from_checkpoint", checkpoint, expect=2)
    assert f"--model_name_or_path {checkpoint}" in result.stdout


def test_a_loss_that_is_not_a_number_names_the_rows(train, tiny_model, chat_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    result = train("--model_name_or_path", model, expect=1)
    assert "FloatingPointError: the loss is NaN or infinite in step 1. The rows of its batch: " in result.stdout
    assert f"{chat_file}:" in result.stdout.split("The rows of its batch: ")[1]


def test_a_tokenizer_larger_than_the_model_is_refused(train, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<new{i}>" for i in range(50)])
    tokenizer.save_pretrained(model)
    result = train("--model_name_or_path", model, expect=2)
    assert "tokenizer has 650 tokens, the model 600" in result.stdout


def test_documents_that_would_leak_are_refused_before_the_model_is_loaded(train, tiny_model, tmp_path):
    """A configuration is enough to know that recurrent layers carry one row into the next."""
    model = tmp_path / "recurrent"
    shutil.copytree(tiny_model, model)
    FalconMambaConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1).save_pretrained(model)
    result = train("--model_name_or_path", model, "--batching", "packed", expect=2)
    assert "--batching packed: FalconMamba has recurrent layers" in result.stdout
    assert "use --batching padded" in result.stdout


def test_dry_run_shows_the_data_and_loads_no_model(train, tmp_path):
    result = train("--dry_run", "True", "--output_dir", tmp_path / "dry")
    assert "[[" in result.stdout
    assert "chats.jsonl" in result.stdout
    assert "Model: " not in result.stdout
    assert {p.name for p in (tmp_path / "dry").iterdir()} == {
        "data_report.html",
        "data_report.json",
        "rejected.jsonl",
        "train_distributed.log",
    }


def test_two_processes_train_on_every_format_and_again_from_the_cache(train, tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0.5}]
    rows = {
        "sharegpt.jsonl.gz": [{"conversations": turns}] * 3,
        "alpaca.json": [{"instruction": f"Say {i}", "input": "", "output": str(i)} for i in range(9)],
        "prompts.jsonl": [{"prompt": f"After {i}?", "completion": str(i + 1)} for i in range(9)],
    }
    for name, some in rows.items():
        text = json.dumps(some) if name.endswith(".json") else "\n".join(map(json.dumps, some))
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    settings = [
        *("--data_files", tmp_path / "sharegpt.jsonl.gz", tmp_path / "alpaca.json", f"{tmp_path}/prompts.jsonl#5"),
        *("--data_weights", 2, 1, 1, "--dedup", "True", "--data_cache_dir", tmp_path / "cache"),
    ]
    first = train(*settings, LAUNCHER="torchrun", DS_CONFIG="")
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert [(entry["format"], entry["kept"]) for entry in report["files"]] == [
        ("sharegpt", 1),
        ("alpaca", 9),
        ("prompt_completion", 5),
    ]
    assert report["total"]["rejected"] == {"duplicate": 2}
    assert "Tokenized data kept in" in first.stdout
    losses = [record["loss"] for record in read_log(tmp_path / "out") if "loss" in record]
    second = train(*settings, "--output_dir", tmp_path / "again", LAUNCHER="torchrun", DS_CONFIG="")
    assert "Tokenized data from the cache" in second.stdout
    assert [record["loss"] for record in read_log(tmp_path / "again") if "loss" in record] == losses


# ---- the command that the launch script builds, seen by stand-ins for the launchers --------------


@pytest.fixture
def launched(tmp_path):
    """Runs train.sh with launchers that only say how they were called; returns that line."""
    for name in ("deepspeed", "torchrun", "accelerate"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(
            f'#!/bin/sh\necho "CALL {name} $* / visible=${{CUDA_VISIBLE_DEVICES-unset}}"\necho exits successfully\n'
        )
        stub.chmod(0o755)

    def call(*flags, **env) -> str:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        settings = {"LOG_DIR": str(tmp_path), "MASTER_PORT": "1234", "VIRTUAL_ENV": "none", "PATH": path, **env}
        result = run(["bash", "scripts/train.sh", *flags], **settings)
        assert result.returncode == 0, result.stdout
        return next(text for text in result.stdout.splitlines() if text.startswith("CALL "))

    return call


def test_gpus_are_chosen_for_deepspeed(launched):
    """It overwrites CUDA_VISIBLE_DEVICES, so it must be told by --include, and never by both."""
    call = launched(CUDA_VISIBLE_DEVICES="4,5,6")
    assert "--include localhost:4,5,6 train_dft.py" in call
    assert "--num_gpus" not in call
    assert call.endswith("visible=unset")
    assert "--include localhost:4,5 train_dft.py" in launched(CUDA_VISIBLE_DEVICES="4,5,6", NPROC="2")
    assert "--num_gpus 3" in launched(CUDA_VISIBLE_DEVICES="", NPROC="3")
    assert "--hostfile hosts" in launched(CUDA_VISIBLE_DEVICES="4,5", HOSTFILE="hosts")


def test_gpus_are_chosen_for_the_other_launchers(launched):
    call = launched(LAUNCHER="torchrun", CUDA_VISIBLE_DEVICES="4,5,6", NPROC="2")
    assert "--nproc-per-node 2" in call
    assert call.endswith("visible=4,5")
    nodes = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "worker-0", "CUDA_VISIBLE_DEVICES": "0,1"}
    call = launched(LAUNCHER="torchrun", **nodes)
    assert "--nnodes 8 --node-rank 3 --master-addr worker-0 --master-port 1234 --nproc-per-node 2" in call
    call = launched(LAUNCHER="accelerate", **nodes)
    assert "--num_machines 8 --machine_rank 3 --main_process_ip worker-0 --main_process_port 1234" in call
    assert "--num_processes 16" in call
    assert "--multi_gpu" in call


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LAUNCHER": "mpirun", "BACKGROUND": "1"}, "LAUNCHER=mpirun; it must be"),
        ({"NNODES": "2", "CUDA_VISIBLE_DEVICES": "0"}, "name the nodes in a HOSTFILE"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8a3f"}, "use LAUNCHER=torchrun for GPUs named by UUID"),
    ],
)
def test_mistakes_in_variables(env, message, tmp_path):
    result = run(["bash", "scripts/train.sh"], LOG_DIR=str(tmp_path), **env)
    assert result.returncode == 2
    assert message in result.stdout


def test_no_gpu_is_no_gpu(launched):
    assert "--num_gpus 1" in launched(CUDA_VISIBLE_DEVICES="-1")


def test_variables_and_flags_reach_the_program(launched):
    call = launched("--dft_alpha", "0.7", MODEL="m", DATA="a.jsonl b.jsonl", OUTPUT_DIR="o", CUDA_VISIBLE_DEVICES="")
    program = call.split("train_dft.py ")[1].split(" / ")[0]
    assert program == (
        "--model_name_or_path m --data_files a.jsonl b.jsonl --output_dir o --deepspeed ds_config/zero3.json "
        "--dft_alpha 0.7"
    )
    assert "--deepspeed" not in launched(DS_CONFIG="", CUDA_VISIBLE_DEVICES="").split("train_dft.py")[1]
