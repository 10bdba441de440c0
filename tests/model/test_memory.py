"""The estimate of a training step's memory: its formulas by hand, and what it counts against what is really saved."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from dft.errors import UserError
from dft.loss import fused
from dft.loss.token_weight import TokenWeight
from dft.model import activations, memory
from dft.model.activations import Activations, Computation, LiveBytes, build_model, count_activations, with_layers
from dft.model.memory import (
    GIB,
    Batch,
    ModelSizes,
    Zero,
    deepspeed_precision,
    estimate,
    loss_head_bytes,
    model_sizes,
    plain_precision,
    read_zero,
    too_large_message,
    warn_if_too_large,
)
from tests.helpers import ROOT

FLOAT, BFLOAT = torch.float32, torch.bfloat16
TINY = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TINY, "intermediate_size": 128, "num_key_value_heads": 2}
QWEN = Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True)
NOTHING = Activations(0, 0)
SIZES = ModelSizes(1200, 0, 0, largest=100, vocab=50, hidden=2, trains_head=True, is_tied=False)
LARGE = ModelSizes(8 * 10**9, 0, 0, largest=6 * 10**8, vocab=150_000, hidden=4096, trains_head=True, is_tied=False)
ADAPTERS = replace(SIZES, trained=120, frozen=1000, quantized=640, trains_head=False)
ONE_TOKEN = Batch(tokens=1, supervised=1)
BUCKETS = {"reduce_bucket": 10, "max_live": 300}


def zero(stage: int, offload: str = "none", **more) -> Zero:
    return Zero(stage, offload, **BUCKETS, **more)


# ---- weights, gradients, optimizer --------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "weights", "gradients", "optimizer"),
    [
        (estimate(SIZES, NOTHING, ONE_TOKEN, plain_precision(FLOAT, False, False), Zero()), 4800, 4800, 9600),
        (estimate(SIZES, NOTHING, ONE_TOKEN, plain_precision(BFLOAT, True, False), Zero()), 2400, 2400, 4800),
        (estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(1), 4), 2400, 2400, 3600),
        (estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(2), 4), 2400, 600, 3600),
        (estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(3), 4), 600, 600, 3600),
        (estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(False), zero(3), 4), 1200, 1200, 3600),
        (estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(2, "optimizer"), 4), 2400, 0, 0),
        (estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(3, "all"), 4), 0, 0, 0),
        # adapters in float32: 120; of the frozen 1000, 640 in 4 bits with 10 scales, 360 in 16 bits
        (estimate(ADAPTERS, NOTHING, ONE_TOKEN, plain_precision(BFLOAT, True, True), Zero()), 1560, 480, 960),
        (estimate(ADAPTERS, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(3), 4), 330, 60, 360),
    ],
)
def test_states_are_those_of_the_zero_paper(found, weights, gradients, optimizer):
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_the_host_holds_what_is_offloaded():
    """12 bytes of states and 4 of the gradient in float32, and the weights too; of this GPU's share."""
    of_stage = {
        offload: estimate(SIZES, NOTHING, ONE_TOKEN, deepspeed_precision(True), zero(3, offload), 4).host
        for offload in ("none", "optimizer", "all")
    }
    assert of_stage == {"none": 0, "optimizer": 4800, "all": 5400}


def test_buckets_are_allocated_as_deepspeed_does():
    """10 elements of 2 bytes; ZeRO-3 gathers 300 of 1200 weights, or the largest tensor; DDP copies gradients."""

    def buckets(gpus: int, zero: Zero) -> tuple[float, float, float]:
        return memory._zero_buckets(SIZES, deepspeed_precision(True), zero, gpus, 2400)

    assert buckets(4, Zero()) == (2400, 0, 0)
    assert buckets(1, Zero()) == (0, 0, 0)
    assert buckets(4, zero(2)) == (0, 20, 1800)
    assert buckets(4, zero(2, overlap=True)) == (0, 40, 1800)
    assert buckets(4, zero(2, "optimizer")) == (0, 20, 0)
    assert buckets(4, zero(3)) == (20 + 600, 20, 1200)
    assert buckets(4, replace(zero(3), max_live=1)) == (20 + 200, 20, 1200)
    assert buckets(4, replace(zero(3), max_live=10**9)) == (20 + 2400, 20, 1200)
    assert buckets(1, zero(3)) == (20, 20, 4800)
    assert buckets(1, zero(3, "all")) == (20 + 600, 20, 0)


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_a_higher_stage_needs_no_more(gpus):
    """Of a large model; a small one is outweighed by ZeRO-3's buckets."""
    config = {
        name: json.loads((ROOT / "ds_config" / f"{name}.json").read_text()) for name in ("zero1", "zero2", "zero3")
    }
    batch, kept = Batch(8192, 8192), Activations(10**9, 10**9)
    stages = [read_zero(one, LARGE.hidden) for one in config.values()]
    totals = [estimate(LARGE, kept, batch, deepspeed_precision(True), one, gpus).total for one in stages]
    assert totals == sorted(totals, reverse=True)
    assert gpus == 1 or totals[0] > totals[1] > totals[2]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_gpus_need_no_more(stage):
    batch = Batch(8192, 8192)
    setting = read_zero({"zero_optimization": {"stage": stage, "stage3_max_live_parameters": 0}}, LARGE.hidden)
    totals = [estimate(LARGE, NOTHING, batch, deepspeed_precision(True), setting, gpus).total for gpus in (2, 4, 64)]
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero1", Zero(1, "none", 5 * 10**8, 10**9, True)),
        ("zero2", Zero(2, "none", 5 * 10**8, 10**9, True)),
        ("zero2_offload", Zero(2, "optimizer", 5 * 10**8, 10**9, True)),
        ("zero3", Zero(3, "none", 5 * 10**8, 10**9, True)),
        ("zero3_offload_optimizer", Zero(3, "optimizer", 5 * 10**8, 10**9, True)),
        ("zero3_offload", Zero(3, "all", 5 * 10**8, 10**9, True)),
    ],
)
def test_the_projects_configurations_are_read(name, expected):
    assert read_zero(json.loads((ROOT / "ds_config" / f"{name}.json").read_text()), 64) == expected


def test_defaults_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 2, 3):
        theirs, ours = DeepSpeedZeroConfig(stage=stage), read_zero({"zero_optimization": {"stage": stage}}, 64)
        assert (ours.reduce_bucket, ours.max_live) == (theirs.reduce_bucket_size, theirs.max_live_parameters)
        assert ours.overlap == theirs.overlap_comm
        assert theirs.sub_group_size == memory.SUB_GROUP
    assert read_zero({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 64).reduce_bucket == 4096


# ---- moments ------------------------------------------------------------------------------------


def test_the_total_is_the_greatest_moment():
    """Gradients are not there yet at the loss head, unless they accumulate; activations are gone at the update."""
    precision = plain_precision(FLOAT, False, False)
    states = 4800 + 9600
    head = loss_head_bytes(SIZES, ONE_TOKEN, precision)
    many, few = Activations(100_000, 1), Activations(10, 1)
    at_head = max(head.forward, head.backward, head.gradient + 1)
    assert estimate(SIZES, many, ONE_TOKEN, precision, Zero()).total == states + 100_000 + at_head
    accumulating = replace(ONE_TOKEN, accumulates=True)
    assert estimate(SIZES, many, accumulating, precision, Zero()).total == states + 4800 + 100_000 + at_head
    assert estimate(SIZES, few, ONE_TOKEN, precision, Zero()).total == states + 4800 + 1


def test_the_margin():
    found = estimate(SIZES, NOTHING, ONE_TOKEN, plain_precision(FLOAT, False, False), Zero())
    assert found.needed == 1.05 * found.total + GIB
    assert found.fits(found.needed)
    assert not found.fits(found.needed - 1)


# ---- the loss head ------------------------------------------------------------------------------


def test_loss_head_by_hand():
    """V 50, H 2, chunks of 5 rows, 16 bits: groups of 30."""
    precision = deepspeed_precision(True)
    chunk_mb = 5 * 50 * 4 / 1e6
    several = loss_head_bytes(SIZES, Batch(100, 40, chunk_mb), precision)
    rows = 40 * 2 * (2 + 4)
    assert several.forward == 5 * 50 * 4 + 30 * 50 * 2 + 50 * 2 * 4 + rows + 30 * 2 * 4
    assert several.backward == rows + 50 * 2 * 4 + 50 * 2 * 2 + 100 * 2 * 2
    assert several.gradient == 50 * 2 * 2
    one_group = loss_head_bytes(SIZES, Batch(100, 30, chunk_mb), precision)
    assert one_group.forward == 5 * 50 * 4 + 30 * 50 * 2 + 30 * 2 * (2 + 4) + 30 * 2 * 4
    frozen = loss_head_bytes(replace(SIZES, trains_head=False), Batch(100, 40, chunk_mb), precision)
    assert frozen.forward == 5 * 50 * 4 + 5 * 50 * 2 + rows + 5 * 2 * 4
    assert frozen.gradient == 0
    autocast = loss_head_bytes(SIZES, Batch(100, 40, chunk_mb), plain_precision(FLOAT, True, False))
    assert autocast.forward == several.forward + 50 * 2 * 2 + 40 * 2 * 2 + 30 * 2 * 2


def test_groups_are_those_of_the_loss():
    assert memory.CHUNKS_OF_GROUP == fused.CHUNKS_OF_GROUP


@pytest.mark.parametrize("supervised", [96, 256])
def test_loss_head_against_its_own_allocations(supervised):
    """The real head on real numbers, in float32; in one chunk and in several."""
    vocab, width, tokens, rows_at_once = 3000, 64, 300, 100
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.full((1, tokens), -100)
    labels[0, 1 : supervised + 1] = 7
    chunk_mb = rows_at_once * vocab * 4 / 1e6
    with LiveBytes() as live:
        for tensor in (hidden, weight, labels):
            live.ignore(tensor)
        loss, _ = fused.fused_dft_loss_sum(hidden, weight, labels, TokenWeight(0.0), chunk_mb=chunk_mb)
        forward, live.peak = live.peak, live.now
        loss.backward()
    sizes = replace(SIZES, vocab=vocab, hidden=width)
    expected = loss_head_bytes(sizes, Batch(tokens, supervised, chunk_mb), plain_precision(FLOAT, False, False))
    assert forward == pytest.approx(expected.forward, rel=0.1)
    assert live.peak == pytest.approx(expected.backward, rel=0.1)


# ---- activations --------------------------------------------------------------------------------


def saved_bytes(config: PretrainedConfig, attention: str, rows: int, length: int) -> int:
    """Bytes that a real model's decoder saves for its backward pass, but for weights."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=FLOAT)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(config.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(
    "config",
    [
        QWEN,
        LlamaConfig(**GROUPED),
        GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ],
    ids=lambda config: config.model_type,
)
def test_activations_are_what_a_real_model_saves(config):
    """Within 5%; attention that holds its scores, or half the layers, would be found out."""
    found = count_activations(config, Computation(2, 96, FLOAT, False, False)).kept
    assert found == pytest.approx(saved_bytes(config, "sdpa", 2, 96), rel=0.05)
    assert found != pytest.approx(saved_bytes(config, "eager", 2, 96), rel=0.05)
    assert found != pytest.approx(saved_bytes(with_layers(config, 1), "sdpa", 2, 96), rel=0.3)


def test_activations_grow_with_tokens_and_not_with_their_square():
    one, two, four = (count_activations(QWEN, Computation(1, n, BFLOAT, False, False)).kept for n in (64, 128, 256))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)


def test_deep_models_are_extrapolated(monkeypatch):
    """4 layers, of which 1 and 2 are traced, against all 4."""
    monkeypatch.setattr(activations, "TRACED_LAYERS", (1, 2))
    deep = Qwen3Config(**{**GROUPED, "num_hidden_layers": 4}, head_dim=16)
    assert deep.layer_types == ["full_attention"] * 4
    how = Computation(2, 64, BFLOAT, False, False)
    found, whole = count_activations(deep, how), activations._trace(deep, how)
    assert found.kept == whole.kept
    assert found.working == pytest.approx(whole.working, rel=0.01)
    assert with_layers(deep, 3).layer_types == ["full_attention"] * 3
    assert deep.num_hidden_layers == 4


def test_recomputation_keeps_the_inputs_of_layers_alone():
    deep = Qwen3Config(**{**GROUPED, "num_hidden_layers": 6}, head_dim=16)
    whole = count_activations(deep, Computation(2, 64, BFLOAT, False, False))
    few = count_activations(deep, Computation(2, 64, BFLOAT, False, True))
    inputs = 6 * 2 * 64 * 64 * 2
    assert inputs < few.kept < 2.5 * inputs
    assert few.kept < 0.2 * whole.kept
    assert few.working > whole.working


def test_autocast_keeps_copies_of_the_weights():
    """Of 32-bit weights that are trained, in 16 bits, as long as the forward pass."""
    weights = sum(p.numel() for name, p in build_model(QWEN, FLOAT).named_parameters() if ".layers." in name)
    kept = {cast: count_activations(QWEN, Computation(1, 2, FLOAT, cast, True)).kept for cast in (True, False)}
    assert kept[True] - kept[False] == pytest.approx(2 * weights, rel=0.05)


def test_mixtures_of_experts_are_counted():
    config = Qwen3MoeConfig(**GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    assert count_activations(config, Computation(2, 64, BFLOAT, False, True)).kept > 0


def test_a_model_that_needs_numbers_is_refused(monkeypatch):
    def fail(*_):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(activations, "_trace", fail)
    with pytest.raises(UserError, match="qwen3 model can't be counted: data-dependent"):
        count_activations(QWEN, Computation(1, 8, BFLOAT, False, False))


@pytest.mark.parametrize("recompute", [True, False])
def test_counting_leaves_everything_as_it_was(recompute, monkeypatch):
    """The configuration, which is the training model's; random numbers; and the other ranks under ZeRO-3."""

    def ask_all_ranks(*_, **__):
        raise AssertionError("a collective that only this rank would join")

    monkeypatch.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("deepspeed.zero.Init", ask_all_ranks)
    config = Qwen3Config(**GROUPED, head_dim=16, attn_implementation="sdpa", dtype="float32")
    before, state = (config.to_dict(), config._attn_implementation, config.dtype), torch.get_rng_state()
    count_activations(config, Computation(1, 8, BFLOAT, False, recompute, lora_r=2))
    assert (config.to_dict(), config._attn_implementation, config.dtype) == before
    assert torch.equal(torch.get_rng_state(), state)


# ---- sizes --------------------------------------------------------------------------------------


def test_sizes_of_a_model():
    """Tied weights count once; adapters are r * (inputs + outputs) of each linear layer but the head."""
    full = model_sizes(build_model(QWEN, BFLOAT))
    assert full.trained == sum(p.numel() for p in AutoModelForCausalLM.from_config(QWEN).parameters())
    assert (full.vocab, full.hidden, full.is_tied, full.trains_head, full.largest) == (512, 64, True, True, 512 * 64)
    linear = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]  # of a layer: q k v o, the MLP
    adapters = model_sizes(build_model(QWEN, BFLOAT, lora_r=8), quantizes=True)
    assert adapters.trained == 2 * sum(8 * (a + b) for a, b in linear)
    assert adapters.frozen == full.trained
    assert adapters.quantized == 2 * sum(a * b for a, b in linear)
    assert not adapters.trains_head
    untied = Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=False)
    assert model_sizes(build_model(untied, BFLOAT)).trained == full.trained + full.head


# ---- the warning --------------------------------------------------------------------------------


def settings_of(**changes) -> SimpleNamespace:
    training = {
        "device": torch.device("cpu"), "process_index": 0, "do_train": True, "gradient_checkpointing": False,
        "activation_checkpointing": False, "deepspeed_plugin": None, "bf16": True, "fp16": False, "batching": None,
        "per_device_train_batch_size": 2, "max_tokens_per_batch": None, "gradient_accumulation_steps": 1,
        "world_size": 1, "sequence_parallel_size": 1, "fsdp": None,
    }  # fmt: skip
    return SimpleNamespace(
        training=SimpleNamespace(**training | changes),
        data=SimpleNamespace(max_length=4096),
        loss=SimpleNamespace(loss_chunk_mb=None),
        model=SimpleNamespace(model_name_or_path="a-model"),
    )


def test_a_run_that_is_too_large_is_told_so():
    model = AutoModelForCausalLM.from_config(QWEN, dtype=FLOAT)
    message = too_large_message(model, settings_of(), longest=512, card=1.0 * GIB)
    assert "This run may need 1 GiB on a GPU of 1 GiB" in message
    assert "--activation_checkpointing True" in message
    assert "scripts/estimate_memory.py a-model" in message
    assert too_large_message(model, settings_of(), longest=512, card=2.0 * GIB) is None
    recomputing = too_large_message(model, settings_of(activation_checkpointing=True), 512, 1.0 * GIB)
    assert "--per_device_train_batch_size or --max_length lower" in recomputing


def test_the_warning_counts_the_greatest_batch(monkeypatch):
    model = AutoModelForCausalLM.from_config(QWEN, dtype=FLOAT)
    counted = []
    monkeypatch.setattr(memory, "count_activations", lambda _, how: counted.append(how) or NOTHING)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config={"zero_optimization": {"stage": 2}}))
    for changes in (
        {},
        {"batching": "packed"},
        {"max_tokens_per_batch": 9000},
        {"deepspeed_plugin": plugin},
    ):
        too_large_message(model, settings_of(**changes), 512, GIB)
    assert [(how.rows, how.length, how.dtype, how.autocast) for how in counted] == [
        (2, 512, FLOAT, True),
        (2, 4096, FLOAT, True),
        (1, 9000, FLOAT, True),
        (2, 512, BFLOAT, False),
    ]


def test_without_a_gpu_nothing_is_estimated():
    warn_if_too_large(None, settings_of(), 512)


def test_on_a_gpu_one_process_warns(monkeypatch, caplog):
    device = torch.device("cuda", 0)
    properties = SimpleNamespace(total_memory=GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    model = AutoModelForCausalLM.from_config(QWEN, dtype=FLOAT)
    for rank in (0, 1):
        warn_if_too_large(model, settings_of(device=device, process_index=rank), 512)
    assert [record.levelname for record in caplog.records if "may need" in record.message] == ["WARNING"]
