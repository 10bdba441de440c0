"""A global batch has the same gradient padded, padding-free and packed; an epoch goes on where it stopped."""

import copy

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader
from transformers import AutoModelForCausalLM, FalconMambaConfig, GPT2Config, TrainerState

from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.leak_check import LeakingDocuments
from dft.batching.packing import PackedRows, best_fit_decreasing
from dft.batching.plan import BatchPlan
from dft.batching.sampler import EpochOrder, FilledRows, SetEpochCallback, token_lengths
from dft.batching.varlen_attention import register
from dft.metrics.throughput import ModelFlops, peak_tflops_of
from examples.make_tiny_model import make_model
from tests.helpers import change_of_weights, relative_error, rows

register()
LEARNING_RATE = 64.0


def all_supervised(count: int) -> Dataset:
    """Rows of 4 to 40 tokens that supervise all of them: nothing must predict the first of each."""
    data = rows(count)
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in data["input_ids"]])


class KeepsFirstLabels(FlatteningCollator):
    """The mutant whose documents are asked for their first token by the last of the document before."""

    def __call__(self, features):
        batch = super().__call__(features)
        return batch | {"labels": batch["input_ids"].clone()}


class OnePosition(FlatteningCollator):
    """The mutant whose documents are one."""

    def __call__(self, features):
        batch = super().__call__(features)
        length = batch["input_ids"].shape[1]
        borders = torch.tensor([0, length], dtype=torch.int32)
        return batch | {
            "position_ids": torch.arange(length)[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": length,
            "max_length_k": length,
        }


def one_step(make_trainer, tokenizer, batching: str, attention: str, collator=None, **settings) -> dict:
    """The gradient of 16 rows, and the records of the step and the evaluation."""
    model = make_model(600, hidden_size=32, num_layers=2)
    model.set_attn_implementation(attention)
    data = all_supervised(16)
    micro_batches = settings.pop("micro_batches", 4)
    packed = PackedRows(data, best_fit_decreasing(token_lengths(data), 96))
    trainer = make_trainer(
        model,
        max_steps=1,
        per_device_train_batch_size=16 // micro_batches if batching != "packed" else 1,
        gradient_accumulation_steps=micro_batches if batching != "packed" else len(packed),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        dft_alpha=0.7,
        peak_tflops=1.0,
        **settings,
    )
    trainer.train_dataset = packed if batching == "packed" else data
    plain = PaddingCollator(tokenizer) if batching == "padded" else FlatteningCollator()
    trainer.data_collator = collator or plain
    evaluation = trainer.evaluate()
    change = change_of_weights(trainer)
    record = next(r for r in trainer.state.log_history if "ce_loss" in r)
    return {"gradient": -change / LEARNING_RATE, "train": record, "eval": evaluation}


def difference(a: dict, b: dict) -> float:
    return relative_error(a["gradient"], b["gradient"])


@pytest.fixture
def padded(make_trainer, tokenizer):
    return one_step(make_trainer, tokenizer, "padded", "eager", micro_batches=1)


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_the_gradient_of_a_global_batch_is_the_same(make_trainer, tokenizer, padded, batching, attention):
    result = one_step(make_trainer, tokenizer, batching, attention)
    assert difference(result, padded) < 1e-5
    for kind, keys in {
        "train": ("loss", "ce_loss", "train/avg_p_correct", "token_accuracy", "grad_norm"),
        "eval": ("eval_loss", "eval_ce_loss", "eval_avg_p_correct", "eval_acc"),
    }.items():
        for key in keys:
            assert result[kind][key] == pytest.approx(padded[kind][key], rel=1e-5), key
    assert (result["train"]["padding_share"] == 0) == (batching != "padded")
    # the same work, whatever the batches: a share of the peak is work by time
    per_token = result["train"]["mfu"] / result["train"]["tokens_per_second"]
    assert per_token == pytest.approx(padded["train"]["mfu"] / padded["train"]["tokens_per_second"], rel=1e-6)


@pytest.mark.parametrize("settings", [{"loss_normalization": "turn"}, {"fused_loss": "off"}, {"torch_compile": True}])
def test_packed_batches_keep_the_gradient_with_other_settings(make_trainer, tokenizer, settings):
    plain = {} if "torch_compile" in settings else settings
    expected = one_step(make_trainer, tokenizer, "padded", "sdpa", **plain)
    assert difference(one_step(make_trainer, tokenizer, "packed", "varlen", **settings), expected) < 1e-5


@pytest.mark.parametrize("mutant", [KeepsFirstLabels, OnePosition])
def test_the_check_rejects_documents_that_touch(make_trainer, tokenizer, padded, mutant):
    result = one_step(make_trainer, tokenizer, "padding_free", "varlen", collator=mutant())
    assert difference(result, padded) > 1e-3


def test_loss_weights_give_the_same_loss_padded_and_flat(make_trainer, tokenizer):
    data = all_supervised(8)
    weighted = data.add_column("loss_weights", [[0.5 + i] * len(ids) for i, ids in enumerate(data["input_ids"])])
    losses = []
    for collator in (PaddingCollator(tokenizer), FlatteningCollator()):
        trainer = make_trainer(dft_alpha=0.7)
        trainer.eval_dataset, trainer.data_collator = weighted, collator
        losses.append(trainer.evaluate()["eval_loss"])
        unweighted = trainer.evaluate(data)["eval_loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(unweighted, rel=1e-3)
    mixed = FlatteningCollator()([weighted[0], data[1]])
    assert mixed["loss_weights"][0].tolist() == [0.5] * len(data[0]["input_ids"]) + [1.0] * len(data[1]["input_ids"])


def test_what_a_batch_without_padding_holds():
    batch = FlatteningCollator()(
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"documents": [{"input_ids": [8, 9], "labels": [8, -100]}]}]
    )
    listed = {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}
    assert listed == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "max_length_q": 3,
        "max_length_k": 3,
        "use_cache": False,
    }
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def test_rows_of_a_loss_that_is_not_a_number_are_named(make_trainer):
    model = make_model(600, hidden_size=32, num_layers=2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    trainer = make_trainer(model, source_of_row=lambda index: f"file:{index}", per_device_train_batch_size=1)
    trainer._finite_check._dataset = data = all_supervised(16)
    trainer.train_dataset = PackedRows(data, np.array([0, 0, 1] + [1] * 13))
    trainer.data_collator = FlatteningCollator()
    with pytest.raises(FloatingPointError, match=r"file:\d+, file:\d+"):
        trainer.train()


def test_batches_of_transformers_own_collator_give_the_same_gradient(make_trainer, tokenizer, padded):
    """It gives positions and no borders."""
    from transformers import DataCollatorWithFlattening

    result = one_step(make_trainer, tokenizer, "padding_free", "varlen", collator=DataCollatorWithFlattening())
    assert difference(result, padded) < 1e-5
    per_token = result["train"]["mfu"] / result["train"]["tokens_per_second"]
    assert per_token == pytest.approx(padded["train"]["mfu"] / padded["train"]["tokens_per_second"], rel=1e-6)


def test_a_model_that_carries_one_document_into_the_next_is_refused(make_trainer):
    config = FalconMambaConfig(vocab_size=600, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    model.forward = lambda input_ids, **_: type(model).forward(model, input_ids=input_ids)
    trainer = make_trainer(model, fused_loss="off")
    trainer.data_collator = FlatteningCollator()
    with pytest.raises(LeakingDocuments, match="--batching padded"):
        trainer.train()


# ---- order over ranks and after a resume --------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("count", [96, 101])
def test_steps_hold_the_same_rows_on_any_number_of_ranks(strategy, count):
    """Global batches of 16 rows, on 1, 2 and 4 ranks; no row twice."""
    lengths = token_lengths(all_supervised(count))
    steps = {}
    for ranks, batch in ((1, 16), (2, 8), (4, 2)):
        filled = FilledRows(range(count), ranks * batch)
        order = EpochOrder(count, len(filled), seed=0, strategy=strategy, lengths=lengths, rows_per_step=16)
        of_ranks = [
            list(BatchSamplerShard(BatchSampler(order, batch, drop_last=False), ranks, rank)) for rank in range(ranks)
        ]
        assert len({len(batches) for batches in of_ranks}) == 1
        accumulation = 16 // (ranks * batch)
        steps[ranks] = [
            {
                row
                for batches in of_ranks
                for some in batches[first : first + accumulation]
                for row in some
                if row < count
            }
            for first in range(0, len(of_ranks[0]), accumulation)
        ]
        assert sum(map(len, steps[ranks])) == count
        assert set().union(*steps[ranks]) == set(range(count))
    assert steps[1] == steps[2] == steps[4]


def test_the_epoch_reaches_the_order_where_a_resumed_run_skips_batches():
    """accelerate's loader doesn't pass it on there, on several ranks."""
    order = EpochOrder(40, 40, seed=0)
    loader = DataLoader(list(range(40)), sampler=order, batch_size=4)
    shard = prepare_data_loader(loader, num_processes=2, process_index=1)
    shard.set_epoch(1)
    whole = [batch.tolist() for batch in shard]
    order.set_epoch(0)
    rest = skip_first_batches(shard, 2)
    rest.set_epoch(1)
    SetEpochCallback(lambda: order).on_epoch_begin(None, TrainerState(epoch=1.4), None)
    assert [batch.tolist() for batch in rest] == whole[2:]


def test_lengths_of_other_rows_are_refused(make_trainer):
    trainer = make_trainer(train_sampling_strategy="group_by_length", row_lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="3 lengths are given for 16 rows"):
        trainer.train()


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_resumed_in_an_epoch_equals_uninterrupted_bit_for_bit(make_trainer, tokenizer, tmp_path, batching):
    """In the second epoch, where the order is another than in the first."""

    def trained(checkpoint=None):
        data = all_supervised(29)
        plan = BatchPlan(batching, 64, None, rows_per_batch=2, batches_per_step=2, seed=5)
        trainer = make_trainer(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            max_steps=-1,
            learning_rate=1e-2,
            train_sampling_strategy=plan.strategy,
            row_lengths=token_lengths(data),
        )
        trainer.train_dataset = plan.training_rows(data, token_lengths(data))
        trainer.data_collator = plan.collator(tokenizer)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
        seen = []
        collate = trainer.data_collator
        trainer.data_collator = lambda features: seen.append(copy.deepcopy(features)) or collate(features)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, seen

    whole, seen = trained()
    steps = whole.state.max_steps // 2
    resumed, seen_again = trained(str(tmp_path / f"checkpoint-{steps + 1}"))
    assert seen_again == seen[-len(seen_again) :]
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- throughput ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
def test_micro_batches_in_tokens_fit_and_the_log_has_their_padding_and_mfu(make_trainer, tokenizer, batching):
    data, capacity = all_supervised(37), 96
    lengths = token_lengths(data)
    plan = BatchPlan(batching, 64, capacity, rows_per_batch=1, batches_per_step=1, seed=0)
    trainer = make_trainer(
        per_device_train_batch_size=1, num_train_epochs=1, max_steps=-1, logging_steps=1000, peak_tflops=0.5
    )
    trainer.train_dataset = plan.training_rows(data, lengths)
    collate, batches = plan.collator(tokenizer), []
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    trainer.args.logging_steps = trainer.state.logging_steps = len(trainer.train_dataset)
    trainer.train()
    positions = [batch["input_ids"].numel() for batch in batches]
    assert max(positions) <= capacity
    assert max(positions) > 64  # more than one row each
    record = next(r for r in trainer.state.log_history if "mfu" in r)
    assert record["padding_share"] == pytest.approx(1 - lengths.sum() / sum(positions))
    flops = ModelFlops(trainer.model)(lengths.sum(), (lengths - 1).sum(), np.square(lengths).sum())
    assert record["mfu"] == pytest.approx(flops / lengths.sum() * record["tokens_per_second"] / 0.5e12)
    supervised = record["supervised_tokens_per_second"] / record["tokens_per_second"]
    assert supervised == pytest.approx((lengths - 1).sum() / lengths.sum())


def test_no_share_of_a_peak_that_is_not_known(make_trainer):
    trainer = make_trainer()
    trainer.train()
    records = [r for r in trainer.state.log_history if "padding_share" in r]
    assert records
    assert not any("mfu" in r for r in records)


def test_operations_of_a_model_are_those_of_its_products():
    """torch's own counter over forward and backward, without attention, which it counts half."""
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(600, hidden_size=32, num_layers=2)
    tokens = 24
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    flops = ModelFlops(model)
    # the first layer's inputs are the embedding's, whose gradient is taken as well
    assert flops(tokens, tokens, 0) == pytest.approx(products, rel=1e-6)
    layers, heads, dim = 2, model.config.num_attention_heads, model.config.head_dim
    assert flops(0, 0, 1) == 12 * layers * heads * dim
    model.model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert ModelFlops(model).per_token == pytest.approx(flops.per_token * 4 / 6)


def test_experts_count_as_often_as_a_token_visits_them():
    from transformers import Qwen3MoeConfig

    settings = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 2,
        "head_dim": 8,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings))
    experts = 2 * 3 * 16 * 8
    attention, router = 16 * 16 * 2 + 2 * 16 * 8, 16 * 8
    assert ModelFlops(model).per_token == 6 * (experts + attention + router)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_of_gpus_by_the_names_that_cuda_gives_them(name, peak):
    assert peak_tflops_of(name) == peak


def test_embedding_tables_count_no_operations():
    """GPT-2's embedding of positions is looked up like that of tokens."""
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    products = sum(p.numel() for name, p in model.transformer.h.named_parameters() if p.ndim == 2)
    assert ModelFlops(model).per_token == 6 * products
    assert ModelFlops(model).per_supervised == 6 * 64 * 16


def test_a_model_whose_operations_are_not_known_trains_without_mfu(make_trainer, monkeypatch):
    def fail(_):
        raise RuntimeError("head_dim differs by layer")

    monkeypatch.setattr("dft.metrics.throughput.ModelFlops", fail)
    trainer = make_trainer(peak_tflops=1.0)
    trainer.train()
    assert not any("mfu" in r for r in trainer.state.log_history)
