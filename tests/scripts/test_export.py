"""scripts/export.py merges adapters, changes the type of weights, and cuts them into shards; what can't be loaded."""

import json
import shutil
import sys

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dft.errors import UserError
from dft.model.trained import load_trained
from scripts import chat, export
from tests.helpers import relative_error


def answer_of(directory) -> str:
    return chat.Chat(load_trained(directory), None, max_new_tokens=16, temperature=0.0).answer("Hi")


def test_a_merged_adapter_is_the_base_with_the_adapter(adapter, tiny_model, tmp_path):
    export.main([str(adapter), "--output", str(tmp_path / "merged")])
    ids = torch.arange(5, 45)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = load_trained(adapter).model(ids).logits
    assert relative_error(merged(ids).logits, expected) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert relative_error(base(ids).logits, expected) > 1e-2
    assert answer_of(tmp_path / "merged") == answer_of(adapter) != answer_of(tiny_model)
    assert (tmp_path / "merged" / "README.md").read_text() == "What this adapter is.\n"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template is not None


def test_a_model_in_another_dtype_and_in_shards(tiny_model, tmp_path):
    out = tmp_path / "out"
    export.main([str(tiny_model), "--output", str(out), "--dtype", "bfloat16", "--max_shard_size", "50KB"])
    original = load_file(tiny_model / "model.safetensors")
    shards = [load_file(path) for path in out.glob("model-*.safetensors")]
    assert len(shards) > 1
    saved = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name].bfloat16()) for name in saved)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert GenerationConfig.from_pretrained(out).eos_token_id == load_trained(tiny_model).end_tokens


def test_exports_that_are_refused(adapter, tiny_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    for place, message in (("full", "isn't empty"), ("full/mine.txt", "can't be made: File exists")):
        with pytest.raises(UserError, match=message):
            export.main([str(adapter), "--output", str(tmp_path / place)])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="--max_shard_size 5: give a number and a unit"):
        export.main([str(adapter), "--output", str(tmp_path / "new"), "--max_shard_size", "5"])
    prefix = tmp_path / "prefix"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")).save_pretrained(prefix)
    with pytest.raises(UserError, match="PREFIX_TUNING puts tokens before the prompt, and can't be merged"):
        export.main([str(prefix), "--output", str(tmp_path / "new")])


def with_base(adapter, directory, base: str):
    """A copy of an adapter that names another base model."""
    shutil.copytree(adapter, directory)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return directory


def test_what_cannot_be_loaded_is_refused(adapter, tiny_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a model directory: neither config.json nor adapter_config.json"):
        load_trained(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="broken: the model can't be loaded"):
        load_trained(broken)
    moved = with_base(adapter, tmp_path / "moved", "outputs/no-such-base")
    with pytest.raises(UserError, match="its base model outputs/no-such-base can't be loaded"):
        load_trained(moved)
    wide = tmp_path / "wide"
    shutil.copytree(adapter, wide)
    (wide / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="wide: the model can't be loaded"):
        load_trained(wide)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        load_trained(adapter)
