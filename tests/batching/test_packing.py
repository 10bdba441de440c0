"""Bins hold what they should, and an epoch's order shows every row once."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from dft.batching.packing import PackedRows, best_fit_decreasing, next_fit, next_fit_padded, padded_tokens
from dft.batching.plan import BatchPlan, choose_batching, padding_waste
from dft.batching.sampler import GROUPED_STEPS, EpochOrder, FilledRows, token_lengths
from dft.errors import UserError
from tests.helpers import rows

CAPACITY = 2048


def chat_lengths(count: int) -> np.ndarray:
    """Log-normal, as those of chats: a median of 150 tokens, a few that are cut at the capacity."""
    drawn = np.random.default_rng(0).lognormal(5.0, 1.0, count)
    return np.clip(drawn, 8, CAPACITY).astype(np.int32)


@pytest.mark.parametrize("pack", [best_fit_decreasing, next_fit, next_fit_padded])
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array),
    st.integers(64, 300),
    st.integers(0, 3),
)
def test_no_bin_holds_more_than_its_capacity(pack, lengths, capacity, seed):
    bins = pack(lengths, capacity, seed)
    held = np.bincount(bins, weights=lengths)
    assert held.min() > 0  # bins are numbered without gaps
    assert np.array_equal(np.unique(bins, return_index=True)[1], sorted(np.unique(bins, return_index=True)[1]))
    assert held.max() <= capacity
    assert np.array_equal(bins, pack(lengths, capacity, seed))
    if pack is next_fit_padded:
        for number in range(bins.max() + 1):
            assert padded_tokens(lengths[bins == number], np.zeros((bins == number).sum(), int)) <= capacity


@pytest.mark.parametrize("pack", [best_fit_decreasing, next_fit, next_fit_padded])
@pytest.mark.parametrize("length", [0, CAPACITY + 1])
def test_rows_that_no_bin_holds_are_refused(pack, length):
    with pytest.raises(ValueError, match="can't be put into"):
        pack(np.array([10, length]), CAPACITY)


def test_best_fit_decreasing_fills_its_bins():
    lengths = chat_lengths(20_000)
    bins = best_fit_decreasing(lengths, CAPACITY)
    assert lengths.sum() / ((bins.max() + 1) * CAPACITY) >= 0.99
    assert np.array_equal(best_fit_decreasing(np.array([5, 4, 3, 3, 2, 1]), 6), [0, 1, 2, 2, 1, 0])


def test_the_seed_chooses_among_rows_of_a_length():
    lengths = chat_lengths(2000)
    one, other = (best_fit_decreasing(lengths, CAPACITY, seed) for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert one.max() == other.max()


def test_bins_of_padded_rows_hold_rows_of_similar_length():
    lengths = chat_lengths(2000)
    bins = next_fit_padded(lengths, CAPACITY)
    in_order = next_fit(lengths, CAPACITY)
    assert 1 - lengths.sum() / padded_tokens(lengths, bins) < 0.05
    assert 1 - lengths.sum() / padded_tokens(lengths, in_order) > 0.4


def test_packed_rows_hold_every_row_once():
    data = rows(20)
    lengths = token_lengths(data)
    packed = PackedRows(data, best_fit_decreasing(lengths, 64))
    items = [packed[i]["documents"] for i in range(len(packed))]
    assert sorted(str(row) for item in items for row in item) == sorted(str(row) for row in data)
    assert max(sum(len(row["input_ids"]) for row in item) for item in items) <= 64
    assert token_lengths(packed).sum() == lengths.sum()
    with pytest.raises(IndexError):
        packed[len(packed)]


# ---- order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("count", [1, 7, 96, 1003])
def test_an_epoch_shows_every_row_once_and_the_fillers_last(strategy, count):
    lengths = chat_lengths(count)
    total = len(FilledRows(list(range(count)), 8))
    order = EpochOrder(count, total, seed=3, strategy=strategy, lengths=lengths, rows_per_step=16)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        seen = list(order)
        assert len(seen) == len(order) == total
        assert sorted(seen[:count]) == list(range(count))
        assert seen[count:] == list(range(count, total))
        assert list(order) == seen
        epochs.append(seen)
    has_one_order = strategy == "sequential" or count == 1 or (strategy == "group_by_length" and count < 16)
    assert (epochs[0] == epochs[1]) == has_one_order
    other = EpochOrder(count, total, seed=4, strategy=strategy, lengths=lengths, rows_per_step=16)
    assert (list(other) == epochs[0]) == has_one_order


def test_steps_hold_rows_of_similar_length_and_come_in_any_order():
    lengths = chat_lengths(3200)
    step = 16
    order = EpochOrder(3200, 3200, seed=0, strategy="group_by_length", lengths=lengths, rows_per_step=step)
    steps = lengths[list(order)].reshape(-1, step)
    padding = 1 - steps.sum() / (steps.max(1) * step).sum()
    assert padding < 0.1
    assert padding_waste(lengths, step) > 0.5
    # a step's place says nothing of the length of its rows
    half = len(steps) // 2
    assert steps[:half].mean() == pytest.approx(steps[half:].mean(), rel=0.05)
    place = np.arange(GROUPED_STEPS)
    for some in steps.mean(1).reshape(-1, GROUPED_STEPS):
        assert abs(np.corrcoef(place, some)[0, 1]) < 0.5


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_fillers_supervise_nothing_and_are_short(kind):
    data = rows(11)
    data = data if kind == "plain" else PackedRows(data, next_fit(token_lengths(data), 64))
    filled = FilledRows(data, multiple=8)
    assert len(filled) % 8 == 0
    assert filled[len(data) - 1] == data[len(data) - 1]
    filler = filled[len(filled) - 1]
    assert filler["labels"] == [-100, -100]
    assert len(filler["input_ids"]) == 2
    with pytest.raises(IndexError):
        filled[len(filled)]


def test_only_sized_sets_of_labeled_rows_can_be_filled_up():
    assert FilledRows.can_fill(rows(3))
    assert FilledRows.can_fill(PackedRows(rows(3), np.zeros(3, dtype=int)))
    assert not FilledRows.can_fill(rows(3).to_iterable_dataset())
    assert not FilledRows.can_fill(Dataset.from_list([{"text": "a"}]))
    assert not FilledRows.can_fill(Dataset.from_list([{"input_ids": [1, 2]}]))
    assert not FilledRows.can_fill([])


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="batch_rebalance"):
        EpochOrder(3, 3, seed=0, strategy="batch_rebalance")


# ---- the plan -----------------------------------------------------------------------------------


def plan(batching: str, max_tokens: int | None = None, **settings) -> BatchPlan:
    defaults = {"rows_per_batch": 4 if max_tokens is None else 1, "batches_per_step": 6, "seed": 0}
    return BatchPlan(batching, CAPACITY, max_tokens, **{**defaults, **settings})


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
@pytest.mark.parametrize("max_tokens", [None, 2 * CAPACITY])
def test_the_plan_says_in_the_report_what_it_does(batching, max_tokens):
    lengths = chat_lengths(1000)
    chosen = plan(batching, max_tokens)
    report = {"files": [{}, {}], "total": {}}
    chosen.add_to_report(report, lengths, [lengths, np.zeros(0)])
    total, data = report["total"], chosen.training_rows(list(range(1000)), lengths)
    assert total["steps_per_epoch"] == -(-len(data) // (6 * chosen.rows_per_batch))
    assert total["training_rows_per_epoch"] == 1000
    assert isinstance(data, PackedRows) == ("bins" in total) == (batching == "packed" or max_tokens is not None)
    if "bins" in total:
        assert total["bins"] == len(data)
        assert total["bin_fill"] > (0.99 if batching == "packed" else 0.8)
    assert (total["padding_share"] > 0) == (batching == "padded")
    assert total["padding_share"] < 0.1
    assert report["files"][0]["padding_waste"] == total["padding_waste"]
    assert report["files"][1]["padding_waste"] is None
    expected = "group_by_length" if batching == "padded" and max_tokens is None else "random"
    assert chosen.strategy == expected
    assert plan("padded", strategy="sequential").strategy == "sequential"
    rebalanced = plan(batching, max_tokens, strategy="batch_rebalance")
    rebalanced.add_to_report(report, lengths, [lengths, lengths])


def test_padding_waste_is_the_share_of_padded_positions():
    assert padding_waste(np.full(6, 8), 3) == 0
    assert padding_waste(np.array([8, 24]), 2) == 1 - 32 / 48
    assert padding_waste(np.array([4]), 2) == 0.5
    assert padding_waste(np.zeros(0), 2) is None


def test_the_default_is_padding_free_where_attention_does_not_pay_for_it():
    from transformers import FalconMambaConfig, Qwen3Config

    assert choose_batching(None, Qwen3Config(), "varlen") == "padding_free"
    assert choose_batching(None, Qwen3Config(), "flash_attention_2") == "padding_free"
    assert choose_batching(None, Qwen3Config(), "sdpa") == "padded"
    assert choose_batching("packed", Qwen3Config(), "sdpa") == "packed"
    assert choose_batching(None, FalconMambaConfig(), "sdpa") == "padded"
    assert choose_batching("padded", FalconMambaConfig(), "sdpa") == "padded"
    assert choose_batching(None, Qwen3Config(), "kernels-community/flash-attn2") == "padding_free"
    for wanted in ("packed", "padding_free"):
        with pytest.raises(UserError, match="recurrent"):
            choose_batching(wanted, FalconMambaConfig(), "sdpa")


def test_without_a_complete_batch_nothing_could_be_trained_on():
    """Where incomplete ones are dropped; a batch is complete when every rank has its rows."""
    lengths = np.full(7, CAPACITY)
    for ranks, rows_per_batch in ((1, 7), (2, 3), (7, 1)):
        chosen = plan("padded", rows_per_batch=rows_per_batch, batches_at_once=ranks, drop_last=True)
        chosen.check_rows(lengths)
        with pytest.raises(
            UserError, match=f"{ranks} micro-batches at once take .* rows, and there are 2, .*drop the flag"
        ):
            chosen.check_rows(lengths[:2])
        plan("padded", rows_per_batch=rows_per_batch, batches_at_once=ranks).check_rows(lengths[:2])
    packed = plan("packed", rows_per_batch=4, drop_last=True)
    with pytest.raises(UserError, match="take 4 bins of rows, and there are 3"):
        packed.check_rows(np.full(6, CAPACITY // 2))
    packed.check_rows(np.full(7, CAPACITY // 2))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_steps_of_an_epoch_are_those_that_the_sampler_makes(ranks, drop_last):
    """Counted on the batches of accelerate, with and without the incomplete ones."""
    chosen = plan("padded", rows_per_batch=2, batches_per_step=2 * ranks, batches_at_once=ranks, drop_last=drop_last)
    for num_rows in range(6, 40):
        total = num_rows if drop_last else -(-num_rows // (2 * ranks)) * 2 * ranks  # with the fillers
        batches = BatchSampler(range(total), 2, drop_last=drop_last)
        shards = [list(BatchSamplerShard(batches, ranks, rank, even_batches=not drop_last)) for rank in range(ranks)]
        assert len({len(shard) for shard in shards}) == 1
        assert chosen.steps_per_epoch(num_rows) == -(-len(shards[0]) // 2)
