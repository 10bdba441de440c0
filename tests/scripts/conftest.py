"""An adapter on the tiny model, for the scripts that load trained models."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """A directory with a LoRA adapter whose weights are random, and with the tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(directory)
    (directory / "README.md").write_text("What this adapter is.\n")
    return directory
