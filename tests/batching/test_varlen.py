"""Documents in one row are computed as if each were alone: attention, whole models, and the check of a run."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dft import attention_kernel
from dft.batching import varlen_attention as varlen
from dft.batching.attention import choose_attention
from dft.batching.collators import FlatteningCollator, boundary_arguments
from dft.batching.leak_check import LeakingDocuments, check_isolation, needs_check
from tests.helpers import relative_error

varlen.register()
LENGTHS = [7, 1, 12, 5]
CLOSE = {"rtol": 1e-8, "atol": 1e-8}  # in float64


def reference(q, k, v, scale, window):
    """Attention of one document [heads, T, D], written out."""
    repeats = q.shape[0] // k.shape[0]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    for head in range(q.shape[0]):
        keys, values = k[head // repeats], v[head // repeats]
        for t in range(q.shape[1]):
            first = 0 if window is None else max(0, t - window + 1)
            weights = torch.softmax(keys[first : t + 1] @ q[head, t] * scale, dim=0)
            out[head, t] = weights @ values[first : t + 1]
    return out


def kernel_of_torch(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn is documented to do; stands in for it where there is no GPU."""
    assert cu_q.dtype == torch.int32
    assert cu_q.tolist() == cu_k.tolist()
    assert max_q == max_k == int(cu_q.diff().max())
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    lengths = cu_q.diff().tolist()
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
    outs = [reference(*part, scale, None if left == -1 else left + 1) for part in parts]
    return torch.cat(outs, dim=1).transpose(0, 1)


def kernel_of_torch_2_11(query, key, value, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale, window_size):
    """That of an older PyTorch, which has no grouped heads and doesn't take the argument."""
    return kernel_of_torch(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


KERNELS = {"kernel": kernel_of_torch, "kernel of torch 2.11": kernel_of_torch_2_11}


@pytest.fixture
def use_kernel(monkeypatch):
    """Puts a function in the place of PyTorch's kernels, whose arguments are looked at anew."""

    def use(kernel) -> None:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        attention_kernel.kernel_options.cache_clear()

    yield use
    monkeypatch.undo()
    attention_kernel.kernel_options.cache_clear()


@pytest.mark.parametrize("path", ["document by document", *KERNELS])
@pytest.mark.parametrize("window", [None, 1, 4, 64])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (20, 20), (24, 16)])
def test_attention_sees_each_document_alone(monkeypatch, use_kernel, path, window, heads, key_heads, dim, value_dim):
    generator = torch.Generator().manual_seed(0)

    def random(num_heads, size):
        values = torch.randn(1, num_heads, sum(LENGTHS), size, generator=generator, dtype=torch.float64)
        return values.requires_grad_()

    q, k, v = random(heads, dim), random(key_heads, dim), random(key_heads, value_dim)
    if path in KERNELS:
        monkeypatch.setattr(varlen, "kernel_takes", lambda *_: True)
        use_kernel(KERNELS[path])
    borders = boundary_arguments(LENGTHS)
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    for scale in (None, 0.3):
        out, _ = varlen.varlen_attention(module, q, k, v, None, 0.0, scale, window, **borders)
        used = 1 / math.sqrt(dim) if scale is None else scale
        parts = zip(*(x[0].split(LENGTHS, dim=1) for x in (q, k, v)), strict=True)
        expected = torch.cat([reference(*part, used, window) for part in parts], dim=1).transpose(0, 1)[None]
        torch.testing.assert_close(out, expected, **CLOSE)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        ours = torch.autograd.grad(out, (q, k, v), upstream)
        theirs = torch.autograd.grad(expected, (q, k, v), upstream)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_rows_without_borders_are_documents():
    q = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    out, _ = varlen.varlen_attention(SimpleNamespace(), q, q, q, None)
    for row, expected in zip(out, q, strict=True):
        alone = reference(expected, expected, expected, 8**-0.5, None)
        torch.testing.assert_close(row.transpose(0, 1), alone, **CLOSE)


def test_attention_that_is_not_causal_sees_every_token():
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    out, _ = varlen.varlen_attention(SimpleNamespace(is_causal=False), q, q, q, None)
    weights = torch.softmax(q @ q.transpose(2, 3) * 8**-0.5, dim=-1)
    torch.testing.assert_close(out, (weights @ q).transpose(1, 2), **CLOSE)


def test_positions_that_start_anew_are_documents():
    q = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    out, _ = varlen.varlen_attention(SimpleNamespace(), q, q, q, None, position_ids=positions)
    for row, states, lengths in zip(out, q, ([3, 3], [5, 1]), strict=True):
        expected = torch.cat([reference(s, s, s, 8**-0.5, None) for s in states.split(lengths, dim=1)], dim=1)
        torch.testing.assert_close(row.transpose(0, 1), expected, **CLOSE)


def test_arguments_that_would_be_ignored_are_refused():
    q = torch.randn(1, 2, 6, 8)
    documents = boundary_arguments([2, 4])
    with pytest.raises(ValueError, match="those before it"):
        varlen.varlen_attention(SimpleNamespace(is_causal=False), q, q, q, None, **documents)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=name):
            varlen.varlen_attention(SimpleNamespace(), q, q, q, None, **{name: 30.0})


def test_the_kernel_gets_16_bits_where_the_model_computes_in_16(monkeypatch, use_kernel):
    """Under autocast the norms of Qwen3 give 32-bit queries and keys beside 16-bit values."""
    seen = []
    monkeypatch.setattr(varlen, "kernel_takes", lambda dtype, *_: seen.append(dtype) or dtype == torch.bfloat16)
    use_kernel(kernel_of_torch)
    model = make("Qwen3Config", "varlen")
    batch = without_labels(FlatteningCollator()(documents_of(LENGTHS)))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).logits.float().sum().backward()
    assert seen == [torch.bfloat16] * 2
    model(**batch)
    assert seen[2:] == [torch.float32] * 2


def test_an_older_torch_repeats_grouped_heads(use_kernel):
    """Which kernel there is, its arguments tell; the two give the same, see above."""
    for kernel, groups in ((kernel_of_torch, True), (kernel_of_torch_2_11, False)):
        use_kernel(kernel)
        assert varlen.has_kernel()
        assert varlen.kernel_groups_heads() == groups


# ---- models -------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 4},
    "Qwen2Config": {},
    "Qwen3Config": {"head_dim": 12},
    "Gemma3TextConfig": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 5},
    "Olmo2Config": {},
    "Phi3Config": {},
    "GraniteConfig": {"attention_multiplier": 0.2},
    "CohereConfig": {},
    "SmolLM3Config": {"no_rope_layers": [1, 0]},
    "GPT2Config": {},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "DeepseekV3Config": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
}


def make(name: str, attention: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **MODELS.get(name, {}), **settings})
    config.initializer_range = 0.3  # so that a leak is seen
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def documents_of(lengths: list[int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 120, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": some, "labels": some} for some in ids]


def without_labels(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_models_keep_documents_apart(name, attention):
    model = make(name, attention).eval()
    rows = documents_of(LENGTHS)
    flat = without_labels(FlatteningCollator()(rows))
    logits = model(**flat).logits[0].split(LENGTHS)
    alone = make(name, "eager").eval()
    for row, ours in zip(rows, logits, strict=True):
        expected = alone(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert needs_check(flat)
    check_isolation(model, flat, 120)
    assert choose_attention("auto", model.config, is_16_bit=False) == "varlen"


@pytest.mark.parametrize("name", ["Qwen3Config", "MistralConfig"])
def test_padded_rows_and_the_cache_are_as_with_sdpa(name):
    ours, theirs = make(name, "varlen").eval(), make(name, "sdpa").eval()
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    for some in (mask, torch.ones_like(ids), None):
        a, b = (model(input_ids=ids, attention_mask=some).logits for model in (ours, theirs))
        real = (torch.ones_like(ids) if some is None else some).bool()
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-4)
    left = mask.flip(1)
    a, b = (
        model.generate(input_ids=ids, attention_mask=left, max_new_tokens=8, do_sample=False)
        for model in (ours, theirs)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["Qwen3Config", "DeepseekV3Config"])
def test_checkpointing_of_activations_keeps_the_gradient(name):
    """Documents of other borders have another one."""

    def gradient(lengths: list[int], is_checkpointing: bool) -> torch.Tensor:
        model = make(name, "varlen").train()
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = without_labels(FlatteningCollator()(documents_of(LENGTHS)))
        model(**batch | boundary_arguments(lengths)).logits.square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(LENGTHS, False)
    assert relative_error(gradient(LENGTHS, True), expected) < 1e-5
    assert relative_error(gradient(LENGTHS[::-1], True), expected) > 1e-3


# ---- the check of a run ---------------------------------------------------------------------------


def test_the_check_finds_leaks():
    batch = without_labels(FlatteningCollator()(documents_of(LENGTHS)))
    model = make("Qwen3Config", "sdpa")
    assert check_isolation(model, batch, 120)
    assert model.training  # as it was
    silent = make("Qwen3Config", "sdpa")
    with torch.no_grad():
        silent.model.norm.weight.zero_()
    assert not check_isolation(silent, batch, 120)  # it can't be told
    # an attention mask of ones takes the place of the one that is made of the positions
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    with pytest.raises(LeakingDocuments, match="--batching padded"):
        check_isolation(model, masked, 120)
    # whoever pads, or makes a mask of his own, has no documents to be kept apart
    padding = {key: masked[key] for key in ("input_ids", "position_ids", "attention_mask")}
    assert not needs_check(padding)
    assert not needs_check(batch | {"attention_mask": torch.ones(1, 1, 25, 25)})
    without = {key: value for key, value in batch.items() if key != "position_ids"}
    with pytest.raises(LeakingDocuments):
        check_isolation(model, without, 120)
    recurrent = AutoModelForCausalLM.from_config(
        transformers.FalconMambaConfig(vocab_size=120, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(LeakingDocuments):
        check_isolation(Ignoring(recurrent), batch, 120)


class Ignoring(torch.nn.Module):
    """A model whose forward ignores where documents begin."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **kwargs):
        return self.model(input_ids=input_ids)
