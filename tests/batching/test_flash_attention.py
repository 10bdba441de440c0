"""Which FlashAttention is chosen, and that each version gets the boundaries of documents from transformers."""

import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils as of_transformers

from dft.batching import flash_attention
from dft.batching.attention import choose_attention, is_quadratic
from dft.batching.collators import FlatteningCollator
from dft.batching.plan import choose_batching
from dft.errors import UserError
from tests.helpers import relative_error

VERSIONS = ("flash_attention_4", "flash_attention_3", "flash_attention_2")
QWEN3 = transformers.Qwen3Config()


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with a GPU of this capability and packages for these versions of FlashAttention."""

    def make(capability: tuple[int, int], *versions: int) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for name in VERSIONS:
            is_installed = int(name[-1]) in versions
            monkeypatch.setitem(flash_attention.IS_INSTALLED, name, lambda found=is_installed: found)

    return make


@pytest.mark.parametrize(
    ("capability", "versions", "expected"),
    [
        ((9, 0), (2, 3, 4), "flash_attention_4"),
        ((9, 0), (2, 3), "flash_attention_3"),
        ((9, 0), (2,), "flash_attention_2"),
        ((9, 0), (4,), "flash_attention_4"),
        ((9, 0), (), "varlen"),
        ((10, 0), (2, 3, 4), "flash_attention_4"),
        ((10, 0), (2, 3), "flash_attention_2"),
        ((12, 0), (2, 3, 4), "flash_attention_2"),
        ((8, 0), (2, 3, 4), "flash_attention_2"),
        ((8, 0), (3, 4), "varlen"),
        ((7, 5), (2, 3, 4), "sdpa"),
    ],
)
def test_auto_is_the_newest_that_can_run(machine, capability, versions, expected):
    machine(capability, *versions)
    assert choose_attention("auto", QWEN3, is_16_bit=True) == expected
    assert choose_attention("auto", QWEN3, is_16_bit=False) == "sdpa"  # none computes in 32 bits


@pytest.mark.parametrize(
    ("capability", "settings", "expected"),
    [
        ((9, 0), {"attention_dropout": 0.1}, "flash_attention_2"),
        ((9, 0), {"head_dim": 256}, "flash_attention_4"),
        ((9, 0), {"head_dim": 84}, "flash_attention_2"),  # which fills sizes up
        ((9, 0), {"head_dim": 512}, "sdpa"),
        ((10, 0), {"head_dim": 256}, "flash_attention_4"),
        ((10, 0), {"head_dim": 192}, "flash_attention_2"),
    ],
)
def test_auto_looks_at_the_heads_of_the_model(machine, capability, settings, expected):
    machine(capability, 2, 3, 4)
    assert choose_attention("auto", transformers.Qwen3Config(**settings), is_16_bit=True) == expected


def test_models_say_which_versions_they_know(machine, monkeypatch):
    machine((9, 0), 2, 3, 4)
    model_class = flash_attention.model_class_of(QWEN3)
    monkeypatch.setattr(model_class, "_compatible_flash_implementations", ["flash_attention_3"])
    assert choose_attention("auto", QWEN3, is_16_bit=True) == "flash_attention_3"
    monkeypatch.setattr(model_class, "_supports_flash_attn", False)
    assert choose_attention("auto", QWEN3, is_16_bit=True) == "varlen"


@pytest.mark.parametrize("requested", VERSIONS)
def test_a_version_that_is_asked_for_stays(machine, requested):
    machine((9, 0), 2, 3, 4)
    assert choose_attention(requested, QWEN3, is_16_bit=True) == requested


@pytest.mark.parametrize("requested", VERSIONS)
def test_one_that_cannot_run_is_replaced_with_a_warning_or_refused(machine, caplog, requested):
    machine((9, 0), *({2, 3, 4} - {int(requested[-1])}))
    newest = next(name for name in VERSIONS if name != requested)
    package = {"4": "flash-attn-4", "3": "flash-attn-3", "2": "flash-attn"}[requested[-1]]
    assert choose_attention(requested, QWEN3, is_16_bit=True) == newest
    assert f"{requested} needs an NVIDIA " in caplog.text
    assert f"the package {package}, 16-bit training" in caplog.text
    assert f": using {newest}" in caplog.text
    with pytest.raises(UserError, match=f"{requested} needs .*; drop --attn_strict to use {newest}"):
        choose_attention(requested, QWEN3, is_16_bit=True, strict=True)


def test_without_a_gpu_it_is_varlen():
    """The packages may be installed all the same."""
    for requested in VERSIONS:
        assert choose_attention(requested, QWEN3, is_16_bit=False) == "varlen"
        with pytest.raises(UserError, match="--attn_strict to use varlen"):
            choose_attention(requested, QWEN3, is_16_bit=False, strict=True)


def test_the_gpus_of_another_maker_are_left_to_version_2(machine, monkeypatch):
    """Their compute capabilities are other numbers."""
    machine((9, 4), 2, 3, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose_attention("auto", QWEN3, is_16_bit=True) == "flash_attention_2"


# ---- the boundaries of documents ----------------------------------------------------------------


def by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    """What the packages' flash_attn_varlen_func is documented to do with tensors [S, heads, E]."""
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    assert causal
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.float().transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    outs = [attend(*part, is_causal=True, scale=softmax_scale, enable_gqa=True)[0].transpose(0, 1) for part in parts]
    return torch.cat(outs).to(q.dtype)


def varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """As versions 2 and 3 are called."""
    return by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)


def varlen_func_of_version_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
):
    """As version 4 is called; it returns the normalizers too."""
    assert qv is None
    out = by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return out, None


def fixed_func(q, k, v, softmax_scale=None, causal=False):
    raise AssertionError("rows of documents were taken for one document each")


@pytest.mark.parametrize("name", VERSIONS)
def test_every_version_gets_the_boundaries_of_documents(monkeypatch, name):
    """Rows of several documents give the logits of each alone; a stand-in for the package runs on the processor."""
    function = varlen_func_of_version_4 if name == "flash_attention_4" else varlen_func
    functions = (fixed_func, function, None, None, None)
    monkeypatch.setattr(of_transformers, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(of_transformers, "_loaded_implementation", None)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3Config(vocab_size=120, num_key_value_heads=2, head_dim=8, **small)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = [torch.randint(3, 120, (length,)).tolist() for length in (7, 1, 12, 5)]
    batch = FlatteningCollator()([{"input_ids": row, "labels": row} for row in ids])
    batch.pop("labels")
    expected = torch.cat([model(torch.tensor([row])).logits[0] for row in ids])
    model.config._attn_implementation = name
    found = model(**batch).logits[0]
    assert relative_error(found, expected) < 1e-5
    assert choose_batching(None, config, name) == "padding_free"
    assert not is_quadratic(config, name)
    # without the boundaries the rows would be one document
    model.config._attn_implementation = "eager"
    assert relative_error(model(batch["input_ids"]).logits[0], expected) > 1e-2
