"""Whole runs on one GPU: ZeRO-3, with weights in CPU memory too, FSDP2, 16 bits, 4 bits, scoring and evaluation."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import read_log, run

pytestmark = [pytest.mark.cuda, pytest.mark.launch]

ZERO3 = {"LAUNCHER": "deepspeed", "NPROC": "1"}
STEPS = ("--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3, "--dft_alpha", 0.7, "--fused_loss", "on")
BF16, FP16 = ("--bf16", "True"), ("--fp16", "True", "--torch_dtype", "float32")
TIMING = ("tokens_per_second", "supervised_tokens_per_second", "memory_gib", "mfu")


def training_records(out: Path) -> list[dict]:
    return [record for record in read_log(out) if "ce_loss" in record]


def assert_trained(out: Path, original: Path, of_all: bool = True) -> None:
    """Every record is finite, and every weight of the saved model is there, finite, and changed.

    Args:
        of_all: False where it is enough that some weights have changed: in 16 bits small updates are lost, and with
            fp16 the first steps may be skipped while the scale of the loss is found.
    """
    records = training_records(out)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records)
    before, saved = (load_file(directory / "model.safetensors") for directory in (original, out))
    assert {name: weight.shape for name, weight in saved.items()} == {n: w.shape for n, w in before.items()}
    assert all(torch.isfinite(weight).all() for weight in saved.values())
    changed = {name for name, weight in saved.items() if not torch.equal(weight, before[name].to(weight.dtype))}
    assert changed == set(saved) if of_all else changed


@pytest.fixture(scope="module")
def whole_and_resumed(train_in, tmp_path_factory) -> SimpleNamespace:
    """A run of 4 steps under ZeRO-3 in bfloat16, and one resumed from its step 2.

    FlashAttention's backward pass adds with atomic operations, so that two runs differ by rounding, except where
    deterministic algorithms are asked for.
    """
    whole, resumed = (tmp_path_factory.mktemp(name) for name in ("whole", "resumed"))
    flags = (*STEPS, *BF16, "--full_determinism", "True")
    first = train_in(whole, *flags, **ZERO3)
    train_in(resumed, *flags, "--resume_from_checkpoint", whole / "out" / "checkpoint-2", **ZERO3)
    return SimpleNamespace(whole=whole / "out", resumed=resumed / "out", output=first.stdout)


def test_zero3_trains_and_saves_a_whole_model(whole_and_resumed, tiny_model, device):
    assert_trained(whole_and_resumed.whole, tiny_model)
    assert "Loss: the head is fused with the loss" in whole_and_resumed.output
    evaluation = json.loads((whole_and_resumed.whole / "all_results.json").read_text())
    assert 0 < evaluation["eval_ce_loss"] < 7
    if device.type == "cuda":
        assert all(0 < record["memory_gib"] < 8 for record in training_records(whole_and_resumed.whole))


def test_zero3_resumes_bit_for_bit(whole_and_resumed):
    ours, theirs = (load_file(d / "model.safetensors") for d in (whole_and_resumed.resumed, whole_and_resumed.whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def last_records(out: Path) -> list[dict]:
        records = [record for record in training_records(out) if record["step"] > 2]
        return [{key: value for key, value in record.items() if key not in TIMING} for record in records]

    assert len(last_records(whole_and_resumed.whole)) == 2
    assert last_records(whole_and_resumed.resumed) == last_records(whole_and_resumed.whole)


def test_the_model_that_zero3_saved_is_reloaded(whole_and_resumed, device):
    saved = load_file(whole_and_resumed.whole / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(whole_and_resumed.whole).to(device)
    assert all(torch.equal(t.cpu(), saved[name]) for name, t in model.state_dict().items() if name in saved)
    ids = torch.arange(3, 40, device=device)[None]
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_zero3_with_weights_and_optimizer_in_cpu_memory(train_in, tiny_model, tmp_path):
    train_in(tmp_path, *STEPS, *BF16, **ZERO3, DS_CONFIG="ds_config/zero3_offload.json")
    assert_trained(tmp_path / "out", tiny_model)


@pytest.mark.parametrize(
    ("flags", "launcher"),
    [
        (BF16, "python"),
        (("--torch_dtype", "bfloat16"), "python"),
        pytest.param(FP16, "python", marks=pytest.mark.only_on_cuda),
        pytest.param(FP16, "deepspeed", marks=pytest.mark.only_on_cuda),
    ],
    ids=["bf16", "bf16 weights", "fp16", "fp16 under ZeRO-3"],
)
def test_16_bits_train(train_in, tiny_model, tmp_path, flags, launcher):
    result = train_in(tmp_path, *STEPS, *flags, LAUNCHER=launcher, NPROC="1")
    assert_trained(tmp_path / "out", tiny_model, of_all=flags == BF16)
    assert ("which loses small updates" in result.stdout) == ("bfloat16" in flags)


def test_fsdp2_trains_and_saves_a_whole_model(train_in, tiny_model, tmp_path):
    train_in(tmp_path, *STEPS, *BF16, "--fsdp", "full_shard", LAUNCHER="accelerate", NPROC="1", DS_CONFIG="")
    assert_trained(tmp_path / "out", tiny_model)


@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_adapters_on_weights_in_4_bits_train(train_in, tmp_path, launcher):
    flags = ("--use_peft", "True", "--load_in_4bit", "True", "--lora_dropout", 0)
    train_in(tmp_path, *STEPS, *BF16, *flags, LAUNCHER=launcher, NPROC="1")
    assert [record["step"] for record in training_records(tmp_path / "out")] == [1, 2, 3, 4]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())
    # B begins with zeros: whatever is in it has been learned
    assert all(weight.abs().sum() > 0 for name, weight in saved.items() if "lora_B" in name)


def test_rows_are_scored_and_a_model_evaluated(tiny_model, chat_file, tmp_path):
    data = ("--data_files", chat_file)
    selection = ("scripts/select_data.py", "ifd", "--model", tiny_model, *data, "--output", tmp_path / "selected")
    ifd = run([sys.executable, *selection])
    assert ifd.returncode == 0, ifd.stdout[-4000:]
    report = json.loads((tmp_path / "selected" / "selection_report.json").read_text())
    assert report["total"]["kept"] + sum(report["total"]["dropped"].values()) > 0
    scores = tmp_path / "scores.json"
    done = run([sys.executable, "scripts/evaluate.py", tiny_model, *data, "--output", scores])
    assert done.returncode == 0, done.stdout[-4000:]
    assert 0 < json.loads(scores.read_text())["ce_loss"] < 7
