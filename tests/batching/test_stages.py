"""The steps of stages: which rows they hold, how often, and in which order, on any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, Sampler

from dft.batching import stages as stages_module
from dft.batching.plan import BatchPlan
from dft.batching.stages import StagedOrder, StagePlan, plan_stages
from dft.config.stages import Stage
from dft.errors import UserError
from tests.helpers import rows

NUM_ROWS = 200
LENGTHS = np.random.default_rng(0).integers(4, 61, NUM_ROWS).astype(np.int32)
BATCHES = BatchPlan("padding_free", 64, None, rows_per_batch=4, batches_per_step=2, seed=3, strategy="random")
FIRST, SECOND = np.arange(120), np.arange(120, NUM_ROWS)  # the rows of two sources


def stage(name: str = "s", steps=None, epochs=None, factor: float = 1.0) -> Stage:
    return Stage(name, {}, False, steps, epochs, None, factor, "stages.yaml:1")


def planned(
    weights: list[tuple[float, float]], batches: BatchPlan = BATCHES, num_steps: int = 0, **length
) -> StagePlan:
    """A plan of one stage for each pair of weights, of the first and of the second source."""
    stages = [stage(f"s{i}", **{key: value[i] for key, value in length.items()}) for i in range(len(weights))]
    sources = [{"first": (FIRST, first), "second": (SECOND, second)} for first, second in weights]
    return plan_stages(stages, sources, LENGTHS, batches, num_steps)


def counts_of(plan: StagePlan, number: int) -> np.ndarray:
    """How often each row is drawn in a stage, int [N]."""
    return np.bincount(plan.stages[number].rows, minlength=NUM_ROWS)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_rows_are_drawn_as_often_as_their_weight_says(strategy):
    batches = replace(BATCHES, strategy=strategy)
    plan = planned([(1, 1), (2.5, 0.1), (0.3, 1.7)], batches, epochs=[1, 2, 4])
    for number, (first, second) in enumerate([(1, 1), (5, 0.2), (1.2, 6.8)]):
        counts, steps = counts_of(plan, number), plan.stages[number].num_steps
        wanted = first * 120 + second * 80
        assert steps == -(-wanted // 8)
        assert counts.sum() == steps * 8  # filled up with further rows of the stage
        for own, times in ((FIRST, first), (SECOND, second)):
            assert abs(counts[own].mean() - times) <= 8 / len(own)
            assert np.floor(times) <= counts[own].min()
            assert counts[own].max() <= np.ceil(times) + 1
    assert (counts_of(plan, 0) >= 1).all()


def test_a_pass_that_is_cut_has_the_sources_in_their_proportion():
    plan = planned([(1, 1)], epochs=[0.5])
    assert plan.num_steps == 13
    counts = counts_of(plan, 0)
    assert counts.max() == 1
    assert counts[FIRST].sum() / counts.sum() == pytest.approx(0.6, abs=0.15)


def test_shares_of_the_steps_are_of_the_whole_training():
    plan = planned([(1, 0), (0, 1), (1, 1)], num_steps=50, steps=[0.3, 0.3, 0.4])
    assert [(s.first_step, s.num_steps) for s in plan.stages] == [(0, 15), (15, 15), (30, 20)]
    assert set(plan.stages[0].rows) <= set(FIRST)
    assert set(plan.stages[1].rows) <= set(SECOND)
    assert sum(s.num_steps for s in planned([(1, 1)] * 3, num_steps=10, steps=[1 / 3] * 3).stages) == 10
    with pytest.raises(UserError, match=r"stages.yaml:1: stage 's0' has 1% of the steps, which is less than one"):
        planned([(1, 0), (0, 1)], num_steps=20, steps=[0.01, 0.99])
    with pytest.raises(UserError, match="a pass of stage 's0' has less than one row"):
        planned([(0.001, 0.001)], num_steps=20, steps=[1])


def test_the_stage_and_its_factor_at_a_step():
    stages = [stage("a", steps=0.5, factor=2.0), stage("b", steps=0.5, factor=0.25)]
    sources = {"all": (np.arange(NUM_ROWS), 1.0)}
    plan = plan_stages(stages, [sources] * 2, LENGTHS, BATCHES, 6)
    assert [plan.number_at(step) for step in range(7)] == [1, 1, 1, 2, 2, 2, 2]
    assert [plan.factor_at(step) for step in range(7)] == [2, 2, 2, 0.25, 0.25, 0.25, 0.25]


def test_each_pass_and_each_stage_has_an_order_of_its_own():
    plan = planned([(1, 1), (1, 1)], epochs=[2, 1])
    first, second, other = plan.stages[0].rows[:200], plan.stages[0].rows[200:400], plan.stages[1].rows
    assert sorted(first) == sorted(second) == sorted(other) == list(range(NUM_ROWS))
    assert len({tuple(some) for some in (first, second, other)}) == 3
    in_order = planned([(1, 1)], replace(BATCHES, strategy="sequential"), epochs=[2])
    assert list(in_order.stages[0].rows) == [*range(NUM_ROWS), *range(NUM_ROWS)]


@pytest.mark.parametrize(
    "settings", [{"batching": "packed"}, {"max_tokens": 96}, {"batching": "padded", "max_tokens": 96}]
)
def test_bins_are_full_steps_of_rows_of_one_stage(settings):
    batches = replace(BATCHES, rows_per_batch=1, **settings)
    plan = planned([(1, 0), (0.25, 2)], batches, epochs=[1, 1])
    data = plan.training_rows(rows(NUM_ROWS))
    assert len(data) == plan.num_steps * plan.items_per_step == len(plan.order())
    capacity = batches.max_tokens or 64
    first_item = 0
    for number, planned_stage in enumerate(plan.stages):
        num_items = planned_stage.num_steps * plan.items_per_step
        assert list(np.unique(planned_stage.items)) == list(range(num_items))
        assert np.bincount(planned_stage.items, weights=LENGTHS[planned_stage.rows]).max() <= capacity
        assert set(planned_stage.rows) <= set(FIRST) or number == 1
        for item in (0, num_items - 1):
            own = planned_stage.rows[planned_stage.items == item]
            assert data[first_item + item]["documents"] == [data.rows[int(i)] for i in own]
        first_item += num_items
    assert (counts_of(plan, 0)[FIRST] >= 1).all()  # no row of a pass is lost
    counts = counts_of(plan, 1)
    assert (counts[SECOND] >= 2).all()
    assert counts[FIRST].sum() == pytest.approx(30, abs=15)


@pytest.mark.parametrize("settings", [{"batching": "packed"}, {"max_tokens": 96}])
def test_bins_are_not_grouped_by_length(settings):
    with pytest.raises(ValueError, match="group_by_length needs rows that are items of their own, not bins"):
        planned([(1, 1)], replace(BATCHES, strategy="group_by_length", **settings), epochs=[1])


@pytest.mark.parametrize(
    ("weights", "length", "message"),
    [
        ((1, 1), {"epochs": [999999999999]}, "draws at least 199,999,999,999,800 rows"),
        ((1e12, 1), {"epochs": [0.5]}, "lower its epochs or the numbers of its sources"),
        ((0, 0.0125), {"epochs": [1e7]}, "goes 10,000,000 times over its sources"),
        ((1, 1), {"steps": [1], "num_steps": 10**12}, "draws at least 8,000,000,000,000 rows"),
        ((0, 0.0125), {"steps": [1], "num_steps": 10**6}, "lower --max_steps, --num_train_epochs or the numbers"),
    ],
)
def test_more_rows_than_can_be_planned_are_refused_before_they_are_drawn(weights, length, message):
    with pytest.raises(UserError, match=f"stages.yaml:1: stage 's0' .*{message}"):
        planned([weights], **length)


def test_the_limit_counts_the_rows_of_bins(monkeypatch):
    batches = replace(BATCHES, batching="packed", rows_per_batch=1)
    plan = planned([(1, 1)], batches, steps=[1], num_steps=40)
    num_rows, num_items = len(plan.stages[0].rows), 40 * plan.items_per_step
    assert num_items < num_rows - 20
    monkeypatch.setattr(stages_module, "MAX_DRAWS", (num_items + num_rows) // 2)
    with pytest.raises(UserError, match=r"stages.yaml:1: stage 's0' draws at least"):
        planned([(1, 1)], batches, steps=[1], num_steps=40)


def test_a_source_is_drawn_many_times_without_copies_of_what_is_drawn():
    again = stages_module._Stream(np.arange(3), np.random.default_rng(1))
    at_once = stages_module._Stream(np.arange(3), np.random.default_rng(1))
    taken = np.concatenate([again.take(count) for count in (1, 4, 0, 2, 5)])
    assert (taken == at_once.take(12)).all()
    assert (np.bincount(taken) == 4).all()


def test_the_order_is_yielded_in_chunks_of_the_same_items(monkeypatch):
    monkeypatch.setattr(stages_module, "INDICES_AT_ONCE", 4)
    items = np.random.default_rng(0).permutation(11)
    assert list(StagedOrder(items)) == items.tolist()


def test_steps_hold_rows_of_similar_length_where_that_is_the_strategy():
    def spread(strategy: str) -> float:
        drawn = planned([(1, 1)], replace(BATCHES, strategy=strategy), epochs=[3]).stages[0].rows
        return LENGTHS[drawn].reshape(-1, 8).std(axis=1).mean()

    assert spread("group_by_length") < spread("random") / 5


# ---- over ranks ---------------------------------------------------------------------------------


def steps_on(ranks: int, order: Sampler, rows_per_batch: int, per_step: int = 16) -> list[list[int]]:
    """The rows of each step, sorted, as accelerate deals them out to so many ranks."""
    dealt = [
        list(BatchSamplerShard(BatchSampler(order, rows_per_batch, drop_last=False), ranks, rank))
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in dealt}) == 1
    accumulation = per_step // (ranks * rows_per_batch)
    return [
        sorted(row for batches in dealt for some in batches[first : first + accumulation] for row in some)
        for first in range(0, len(dealt[0]), accumulation)
    ]


class OfItsWorld(Sampler):
    """The mutant whose order depends on the number of ranks."""

    def __init__(self, plan: StagePlan, ranks: int):
        self.items = np.random.default_rng(ranks).permutation(plan.order().items)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self):
        yield from self.items.tolist()


SHAPES = ((1, 16), (1, 4), (2, 8), (4, 2))  # ranks, and rows of a micro-batch


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_steps_are_the_same_on_any_number_of_ranks_and_none_has_rows_of_two_stages(strategy):
    of_shapes, of_mutants = [], []
    for ranks, batch in SHAPES:
        batches = replace(BATCHES, rows_per_batch=batch, batches_per_step=16 // batch, batches_at_once=ranks)
        batches = replace(batches, strategy=strategy)
        plan = planned([(1, 0), (0, 1.5), (0.5, 0.5)], batches, epochs=[1, 1, 1])
        of_shapes.append(steps_on(ranks, plan.order(), batch))
        of_mutants.append(steps_on(ranks, OfItsWorld(plan, ranks), batch))
        assert len(of_shapes[-1]) == plan.num_steps
    assert all(steps == of_shapes[0] for steps in of_shapes)
    assert not all(steps == of_mutants[0] for steps in of_mutants)
    first, second, _ = plan.stages
    for step, drawn in enumerate(of_shapes[0]):
        if step < first.num_steps:
            assert set(drawn) <= set(FIRST)
        elif step < second.first_step + second.num_steps:
            assert set(drawn) <= set(SECOND)


def test_the_order_depends_on_the_seed_and_the_stage_alone():
    lengths = {"epochs": [1, 1]}
    orders = [planned([(1, 1), (0.5, 1)], BATCHES, **lengths).order().items for _ in range(2)]
    assert (orders[0] == orders[1]).all()
    other_seed = planned([(1, 1), (0.5, 1)], replace(BATCHES, seed=4), **lengths)
    assert (other_seed.order().items != orders[0]).any()
    other_first = planned([(0.5, 0.5), (0.5, 1)], BATCHES, **lengths)
    same_second = planned([(1, 1), (0.5, 1)], BATCHES, **lengths)
    assert (other_first.stages[1].rows == same_second.stages[1].rows).all()


def test_facts_tell_plans_apart():
    base = planned([(1, 1)], epochs=[1]).facts
    assert base == planned([(1, 1)], epochs=[1]).facts
    assert base[0]["steps"] == 25
    for other in (
        planned([(1, 0.5)], epochs=[1]),
        planned([(1, 1)], epochs=[2]),
        planned([(1, 1)] * 2, epochs=[1, 1]),
    ):
        assert other.facts != base
    again = plan_stages([stage("s0", epochs=1, factor=0.5)], [{"all": (np.arange(200), 1.0)}], LENGTHS, BATCHES, 0)
    assert again.facts[0]["learning_rate_factor"] == 0.5
