"""Which rows are chosen: sampling, duplicates, leaks, the split and the mix, on random catalogs."""

import numpy as np
import pytest

from dft.config.data import DataConfig
from dft.data.report import describe_mix
from dft.data.selection import Catalog, digests, hold_out, mix, select
from dft.errors import UserError
from dft.reading.discovery import DataFile
from dft.reading.rows import Conversation


def catalog(num_rows: int = 400, num_files: int = 3, seed: int = 0, **file_settings) -> Catalog:
    """Rows of which many are equal, and more have equal prompts, spread over files."""
    rng = np.random.default_rng(seed)
    file = np.sort(rng.integers(num_files, size=num_rows)).astype(np.int32)
    prompt = rng.integers(num_rows // 2, size=num_rows).astype(np.uint64)
    content = prompt * np.uint64(2) + rng.integers(2, size=num_rows).astype(np.uint64)
    ordinal = np.concatenate([np.arange(n) for n in np.bincount(file, minlength=num_files)])
    files = [DataFile(f"{i}.jsonl", **file_settings) for i in range(num_files)]
    return Catalog(files, file, ordinal, content, prompt, np.bincount(file).tolist(), has_weights=False)


def choose(rows: Catalog, train=(0, 1, 2), evaluation=(), **settings):
    seed = settings.pop("seed", 0)
    config = DataConfig(["unused"], **{"validation_split_percentage": 0.0, "max_eval_samples": None, **settings})
    return select(rows, train, evaluation, config, seed)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_equal_prompts_on_one_side(seed):
    rows = catalog(seed=seed)
    chosen = choose(rows, validation_split_percentage=10, seed=seed)
    assert chosen.evaluation.sum() == 40
    assert (chosen.train ^ chosen.evaluation).all()
    assert not set(rows.prompt[chosen.train]) & set(rows.prompt[chosen.evaluation])
    assert not chosen.leaked.any()


def test_a_split_is_by_the_prompts_and_not_by_their_order():
    rows = catalog()
    everything = np.ones(400, dtype=bool)
    held_out = hold_out(rows.prompt, everything, 10, None, seed=0)
    turned = hold_out(rows.prompt[::-1], everything, 10, None, seed=0)
    assert (held_out == turned[::-1]).all()
    assert (held_out != hold_out(rows.prompt, everything, 10, None, seed=1)).any()
    assert hold_out(rows.prompt, everything, 10, 7, seed=0).sum() <= 7
    assert hold_out(rows.prompt, everything, 0.01, None, seed=0).sum() == 1


def test_a_split_of_one_prompt_is_refused():
    with pytest.raises(UserError, match="4 rows with 1 different prompts can't be split"):
        hold_out(np.zeros(4, dtype=np.uint64), np.ones(4, dtype=bool), 50, None, seed=0)


@pytest.mark.parametrize("seed", range(5))
def test_dedup_keeps_the_first_of_equal_rows(seed):
    rows = catalog(seed=seed)
    chosen = choose(rows, dedup=True)
    kept = rows.content[chosen.train]
    assert len(kept) == len(set(kept)) == len(set(rows.content))
    for index in np.flatnonzero(chosen.duplicate):
        assert rows.content[index] in rows.content[:index][chosen.train[:index]]
    assert (chosen.dropped["duplicate"] == chosen.duplicate).all()
    assert choose(rows).train.all()
    assert (choose(rows).duplicate == chosen.duplicate).all()


def test_leaks_are_counted_and_dropped_on_request():
    rows = catalog()
    shared = np.isin(rows.prompt, rows.prompt[rows.file == 2]) & (rows.file != 2)
    kept = choose(rows, (0, 1), (2,))
    assert (kept.leaked == shared).all()
    assert (kept.train == (rows.file != 2)).all()
    dropped = choose(rows, (0, 1), (2,), drop_leaked=True)
    assert (dropped.train == (rows.file != 2) & ~shared).all()
    assert (dropped.evaluation == (rows.file == 2)).all()


def test_sampling():
    rows = catalog(max_rows=10)
    chosen = choose(rows)
    assert np.bincount(rows.file[chosen.train]).tolist() == [10, 10, 10]
    assert (chosen.train == choose(rows).train).all()
    assert (chosen.train != choose(rows, seed=1).train).any()
    assert choose(rows, (0, 1), (2,), max_eval_samples=4).evaluation.sum() == 4


def test_mixing():
    file = np.repeat([0, 1, 2], [10, 10, 5]).astype(np.int32)
    files = [DataFile("a", weight=2.0), DataFile("b", weight=0.3), DataFile("c", weight=1.4)]
    order = mix(file, files, seed=0)
    copies = np.bincount(order, minlength=25)
    assert copies[:10].tolist() == [2] * 10
    assert sorted(copies[10:20]) == [0] * 7 + [1] * 3
    assert sorted(copies[20:]) == [1] * 3 + [2] * 2
    assert mix(file, [DataFile("a"), DataFile("b"), DataFile("c")], seed=0) is None


def test_many_small_files_are_drawn_like_a_large_one():
    file = np.repeat(np.arange(61), [*[1] * 60, 30]).astype(np.int32)
    of_mix = [DataFile(f"{i}", weight=0.3 if i < 60 else 0.9, entry=int(i == 60)) for i in range(61)]
    of_weights = [DataFile(f"{i}", weight=0.3 if i < 60 else 0.9) for i in range(61)]
    for files in (of_mix, of_weights):
        drawn = mix(file, files, seed=0)
        assert ((drawn < 60).sum(), (drawn >= 60).sum()) == (18, 27)
        assert len(np.unique(drawn)) == 45
    same_weight = [DataFile("a", weight=0.5, entry=0), DataFile("b", weight=0.5, entry=1)]
    drawn = mix(np.repeat([0, 1], [10, 30]).astype(np.int32), same_weight, seed=0)
    assert ((drawn < 10).sum(), (drawn >= 10).sum()) == (5, 15)


def test_the_report_of_a_mix_counts_what_is_drawn():
    config = DataConfig(["many", "big", "none"], mix="1:1:0", mix_by="rows")
    files = [DataFile("a", weight=0.4, entry=0), DataFile("b", weight=0.4, entry=0), DataFile("c", entry=1)]
    file = np.array([0, 0, 1, 2, 2], dtype=np.int32)
    seen = [entry["times_seen"] for entry in describe_mix(config, files, file, np.array([1, 3, 4]))]
    assert seen == [pytest.approx(1 / 3), 1.0, 0.0]
    assert [entry["times_seen"] for entry in describe_mix(config, files, file, None)] == [1.0, 1.0, 0.0]


def row(*messages: tuple[str, str], tools=None, **assistant) -> Conversation:
    listed = [{"role": role, "content": text, **(assistant if role == "assistant" else {})} for role, text in messages]
    return Conversation(listed, tools, None, "p", 1, "")


def test_digests():
    chat = (("user", "Q"), ("assistant", "A"))
    content, prompt = digests(row(*chat))
    assert digests(row(("user", " Q\n"), ("assistant", "A"))) == (content, prompt)
    weighted = digests(row(*chat, weight=0.5))
    assert weighted[0] != content  # other labels
    assert weighted[1] == prompt
    other = digests(row(("user", "Q"), ("assistant", "B")))
    assert other[0] != content
    assert other[1] == prompt
    assert digests(row(*chat, tools=[{"name": "f"}]))[1] != prompt
    assert digests(row(("user", "q"), ("assistant", "A")))[1] != prompt
    assert digests(row(*chat, ("user", "Q"), ("assistant", "A")))[1] != prompt
    assert len({digests(row(("assistant", text)))[1] for text in "ab"}) == 2  # no question: not one prompt
