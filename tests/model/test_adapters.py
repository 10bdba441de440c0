"""Adapters on a model: what is trained and saved, that it fits the original model, and names that don't exist."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from dft.config.adapters import AdapterConfig
from dft.config.model import ModelConfig
from dft.errors import UserError
from dft.model import adapters as adapters_module
from dft.model.adapters import check_adapters, check_shardable, keep_products_exact, quantization, with_adapters
from scripts import export
from tests.helpers import relative_error

IDS = torch.arange(5, 45)[None]
HEAD_TOO = ["q_proj", "down_proj", "lm_head"]


def adapted(tiny_model, **settings) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    return with_adapters(base, AdapterConfig(use_peft=True, lora_r=4, **settings), seed=1)


def train(model) -> torch.Tensor:
    """Changes the adapters by gradients, and returns the logits."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=20.0)
    model.eval()  # without dropout
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model(IDS).logits.detach()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_target_modules": HEAD_TOO},
        {"lora_init": "gaussian", "use_rslora": True},
        {"lora_init": "orthogonal"},
        {"use_dora": True},
        {"lora_init": "pissa"},
        {"lora_init": "olora", "use_rslora": True},
        {"lora_modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
def test_what_is_saved_fits_the_original_model(tiny_model, tmp_path, settings, capsys):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits
    model = adapted(tiny_model, **settings)
    assert relative_error(model.eval()(IDS).logits, base) < 1e-5, "adapters change nothing at first"
    expected = train(model)
    assert relative_error(expected, base) > 1e-2
    for name in ("final", "checkpoint-3"):
        model.save_pretrained(tmp_path / name)
        original = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert relative_error(PeftModel.from_pretrained(original, tmp_path / name)(IDS).logits, expected) < 1e-5
    assert relative_error(model(IDS).logits, expected) < 1e-6, "saving changes nothing"
    export.main([str(tmp_path / "final"), "--output", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert relative_error(merged(IDS).logits, expected) < 1e-5
    assert not (tmp_path / "final" / "README.md").exists()  # of peft
    if not settings.get("lora_modules_to_save"):
        saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
        assert all("lora_" in name for name in saved)


def test_a_converted_adapter_needs_no_weights_taken_off(tiny_model, tmp_path):
    """The saved one is a plain adapter of twice the rank; without the conversion it would not be."""
    model = adapted(tiny_model, lora_init="pissa")
    train(model)
    model.save_pretrained(tmp_path / "final")
    settings = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["r"], settings["lora_alpha"]) == (True, 8, 64)
    assert settings["base_model_name_or_path"] == str(tiny_model)


def test_all_ranks_begin_alike_and_other_random_numbers_stay(tiny_model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = adapted(tiny_model)
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(4)  # as on another rank
    second = adapted(tiny_model)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_only_adapters_are_trained_and_their_share_is_told(tiny_model, caplog):
    caplog.set_level(logging.INFO)
    model = adapted(tiny_model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert f"{count:,} of {total:,} ({100 * count / total:.2f}%) parameters are trained" in caplog.text


def test_going_on_from_an_adapter_trains_it(tiny_model, tmp_path):
    first = adapted(tiny_model, lora_target_modules=["v_proj"])
    expected = train(first)
    first.save_pretrained(tmp_path / "first")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    second = with_adapters(base, AdapterConfig(adapter=str(tmp_path / "first")), seed=1)
    assert relative_error(second.eval()(IDS).logits, expected) < 1e-6
    assert relative_error(train(second), expected) > 1e-3
    assert {n.split(".")[-4] for n, p in second.named_parameters() if p.requires_grad} == {"v_proj"}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "8 bits"])
def test_weights_in_few_bits_are_near_the_original(tiny_model, tmp_path, kind):
    bits = {"load_in_8bit": True} if kind == "8 bits" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    settings = AdapterConfig(use_peft=True, **bits)
    arguments = quantization(settings, TrainingArguments(tmp_path, use_cpu=True), torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_model, **arguments)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits
    keep_products_exact(quantized)
    model = with_adapters(quantized, settings, seed=1)
    assert 1e-4 < relative_error(model.eval()(IDS).logits, expected) < 0.5
    moved = train(model)
    assert relative_error(moved, expected) > 1e-2
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tiny_model, **arguments)
    keep_products_exact(again)
    assert relative_error(PeftModel.from_pretrained(again, tmp_path / "adapter")(IDS).logits, moved) < 1e-5


def test_an_evaluation_leaves_weights_in_4_bits_as_they_are(tiny_model, make_trainer, tmp_path, monkeypatch):
    """On processors for which bitsandbytes would repack them, as this one then is taken for."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    settings = AdapterConfig(use_peft=True, load_in_4bit=True)
    arguments = quantization(settings, TrainingArguments(tmp_path, use_cpu=True), torch.float32)
    model = with_adapters(AutoModelForCausalLM.from_pretrained(tiny_model, **arguments), settings, seed=1)
    trainer = make_trainer(model=model)
    expected = model.train()(IDS).logits.detach()
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(IDS).logits, expected)
    assert torch.equal(model.train()(IDS).logits.detach(), expected)


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_wrong_name_of_a_layer_gets_the_nearest(tiny_model):
    with pytest.raises(UserError, match="--lora_target_modules q_prj: .*did you mean q_proj"):
        adapted(tiny_model, lora_target_modules=["q_prj"])
    with pytest.raises(UserError, match="there are down_proj, gate_proj, k_proj"):
        adapted(tiny_model, lora_target_modules=["xxxxxx"])


def test_a_part_of_a_tied_head_cannot_be_taken(tiny_model):
    with pytest.raises(UserError, match="would change the embedding"):
        adapted(tiny_model, lora_init="pissa", lora_target_modules=HEAD_TOO)


def test_an_adapter_of_another_model_is_refused(tiny_model, tmp_path):
    adapted(tiny_model).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=f"--adapter {tmp_path} doesn't fit the model"):
        with_adapters(base, AdapterConfig(adapter=str(tmp_path)), seed=1)


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"adapter": "nowhere"}, {}, "--adapter nowhere: no directory with an adapter_config.json"),
        ({"use_peft": True}, {"resize_embeddings": True}, "--resize_embeddings changes the model"),
    ],
)
def test_what_can_be_known_before_is(settings, model, message):
    with pytest.raises(UserError, match=message):
        check_adapters(AdapterConfig(**settings), ModelConfig("x", **model))


def test_an_adapter_is_no_model(tiny_model, tmp_path):
    adapted(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is an adapter: go on from it with --model_name_or_path {tiny_model}"):
        check_adapters(AdapterConfig(), ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setattr(adapters_module, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=rf'{package} is not installed.*pip install -e "\.\[adapters\]"'):
        check_adapters(AdapterConfig(use_peft=True, load_in_4bit=True), ModelConfig("x"))


@pytest.mark.parametrize("settings", [{"lora_init": "pissa"}, {"load_in_8bit": True}])
def test_what_needs_whole_weights_is_refused_under_zero3(monkeypatch, settings):
    monkeypatch.setattr(adapters_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="ZeRO-2"):
        check_adapters(AdapterConfig(use_peft=True, **settings), ModelConfig("x"))


def test_what_fsdp_cannot_shard_is_refused(tiny_model):
    with pytest.raises(UserError, match="--load_in_8bit: FSDP can't cut up weights in 8 bits"):
        check_adapters(AdapterConfig(use_peft=True, load_in_8bit=True), ModelConfig("x"), is_fsdp=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    check_shardable(with_adapters(base, AdapterConfig(use_peft=True, lora_target_modules=["lm_head"]), seed=1))
    for name in ("lm_head", "embed_tokens"):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        copied = with_adapters(base, AdapterConfig(use_peft=True, lora_modules_to_save=[name]), seed=1)
        with pytest.raises(UserError, match="--lora_modules_to_save: this model's head is tied"):
            check_shardable(copied)


@pytest.mark.parametrize(
    ("engine", "storage"),
    [({}, torch.float32), ({"fsdp": True}, torch.bfloat16), ({"deepspeed": "zero2.json"}, torch.bfloat16)],
)
def test_engines_get_4_bits_in_the_type_that_they_convert_weights_to(engine, storage):
    """Others would be rounded, and then be other weights."""
    args = SimpleNamespace(**{"bf16": True, "fp16": False, "fsdp": None, "deepspeed": None} | engine, device="cpu")
    settings = AdapterConfig(use_peft=True, load_in_4bit=True)
    config = quantization(settings, args, torch.float32)["quantization_config"]
    assert config.bnb_4bit_quant_storage == storage
