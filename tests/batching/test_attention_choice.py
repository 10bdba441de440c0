"""Which attention implementation is chosen for a model and a machine, and what is refused."""

import pytest
import torch
import transformers

from dft import attention_kernel
from dft.batching import varlen_attention as varlen
from dft.batching.attention import choose_attention, why_documents_leak
from dft.batching.flash_attention import model_class_of
from dft.batching.plan import choose_batching
from dft.errors import UserError


def test_kernels_run_in_16_bits_on_recent_gpus(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, is_new in (((8, 0), True), ((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert varlen.kernel_takes(torch.bfloat16, cuda, 128) == is_new
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert varlen.kernel_takes(torch.float16, cuda, 256)
    assert not varlen.kernel_takes(torch.float32, cuda, 128)
    assert not varlen.kernel_takes(torch.bfloat16, cuda, 264)
    assert not varlen.kernel_takes(torch.bfloat16, cuda, 128, dropout=0.1)
    assert not varlen.kernel_takes(torch.bfloat16, torch.device("cpu"), 128)
    monkeypatch.setattr(varlen, "has_kernel", lambda: False)
    assert not varlen.kernel_takes(torch.bfloat16, cuda, 128)


def test_the_oldest_kernels_are_not_used_and_this_is_said(monkeypatch, caplog):
    """Those of PyTorch 2.10 take neither a scale nor a window."""
    oldest = "query key value cu_seq_q cu_seq_k max_q max_k is_causal return_aux"
    monkeypatch.setattr(attention_kernel, "kernel_options", lambda: frozenset(oldest.split()))
    assert not varlen.has_kernel()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    config = transformers.Qwen3Config()
    reason = "has no FlashAttention for documents with sliding windows; 2.11 has"
    assert choose_attention("auto", config, is_16_bit=True) == "sdpa"
    warning = caplog.records[-1]
    assert (warning.levelname, reason in warning.getMessage()) == ("WARNING", True)
    assert choose_attention("varlen", config, is_16_bit=True) == "varlen"
    assert f"goes from document to document: PyTorch {torch.__version__} {reason}" in caplog.text
    assert choose_batching(None, config, "sdpa") == "padded"
    caplog.clear()
    assert choose_attention("auto", config, is_16_bit=False) == "sdpa"  # where an update would change nothing
    assert "WARNING" not in {record.levelname for record in caplog.records}


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Gemma2Config", {}, "attn_logit_softcapping"),
        ("GptOssConfig", {}, "in a way of its own"),
        ("Llama4TextConfig", {}, "chunked_attention"),
        ("Qwen3NextConfig", {}, "linear_attention"),
        ("FalconMambaConfig", {}, "linear_attention"),
        ("PhimoeConfig", {}, "in its masks"),
        ("Qwen2MoeConfig", {"use_sliding_window": True, "max_window_layers": 2}, "in its masks"),
        ("RobertaConfig", {"is_decoder": True}, "encoder"),
    ],
)
def test_models_that_need_another_attention_get_sdpa(name, settings, reason):
    config = getattr(transformers, name)(**settings)
    assert choose_attention("auto", config, is_16_bit=True) == "sdpa"
    with pytest.raises(UserError, match=reason):
        choose_attention("varlen", config, is_16_bit=True)
    assert choose_attention("eager", config, is_16_bit=True) == "eager"


@pytest.mark.parametrize(
    ("capability", "is_16_bit", "settings", "expected"),
    [
        ((9, 0), True, {}, "varlen"),
        ((9, 0), False, {}, "sdpa"),
        ((7, 5), True, {}, "sdpa"),
        ((9, 0), True, {"head_dim": 512}, "sdpa"),
        ((9, 0), True, {"attention_dropout": 0.1}, "sdpa"),
    ],
)
def test_on_a_gpu_varlen_is_chosen_where_its_kernels_run(monkeypatch, capability, is_16_bit, settings, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    config = transformers.Qwen3Config(**settings)
    assert choose_attention("auto", config, is_16_bit=is_16_bit) == expected
    assert choose_attention("varlen", config, is_16_bit=is_16_bit) == "varlen"
    assert choose_attention("auto", transformers.Gemma4TextConfig(), is_16_bit=True) == "sdpa"


def test_code_that_comes_with_the_model_is_not_trusted_to_pass_borders_on():
    config = transformers.Qwen3Config()
    config.auto_map = {"AutoModelForCausalLM": "modeling.Own"}
    assert model_class_of(config) is None
    assert choose_attention("auto", config, is_16_bit=True) == "sdpa"


def test_recurrent_layers_leak():
    assert "recurrent" in why_documents_leak(transformers.FalconMambaConfig())
    assert why_documents_leak(transformers.Qwen3Config()) is None
