"""Adapters on weights in 4 bits, trained by the program under ZeRO-3 on two processes, saved, and resumed."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import relative_error

pytestmark = pytest.mark.launch

FLAGS = (
    *("--use_peft", "--lora_r", 4, "--load_in_4bit", "--learning_rate", 0.05, "--save_steps", 1),
    *("--save_total_limit", 2, "--validation_split_percentage", 10),
    *("--eval_generations", 3, "--eval_max_new_tokens", 5),
)
ENV = {"LAUNCHER": "deepspeed", "DS_CONFIG": "ds_config/zero3.json"}


def adapter_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_an_adapter_of_zero3_in_4_bits_fits_the_model_and_is_resumed(train_in, tiny_model, tmp_path):
    done = train_in(tmp_path / "whole", *FLAGS, **ENV)
    out = tmp_path / "whole" / "out"
    saved = adapter_of(out)
    assert all("lora_" in name for name in saved)
    assert not list(out.glob("model*.safetensors"))
    assert f"Adapters: {sum(t.numel() for t in saved.values()):,} of " in done.stdout
    card = (out / "README.md").read_text()
    assert "LoRA adapter on" in card
    assert f"| trained parameters | {sum(t.numel() for t in saved.values()):,} of " in card
    assert json.loads((out / "run.json").read_text())["adapters"]["lora_r"] == 4
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in answers] == [1] * 3 + [2] * 3

    ids = torch.arange(5, 45)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = base(ids).logits
    adapted = PeftModel.from_pretrained(base, out)
    loaded = {name.replace(".default", ""): p for name, p in adapted.named_parameters() if "lora_" in name}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert relative_error(adapted(ids).logits, expected) > 1e-3

    train_in(tmp_path / "resumed", *FLAGS, "--resume_from_checkpoint", out / "checkpoint-1", **ENV)
    again = adapter_of(tmp_path / "resumed" / "out")
    assert all(torch.equal(again[name], saved[name]) for name in saved)
