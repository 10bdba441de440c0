"""The commands that choose by embeddings: which rows they keep, by which numbers, and what they refuse."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from data_utils import load_conversations
from dft.errors import UserError
from dft.selection.diversity import DiversityConfig, diversity
from dft.selection.embeddings import embed, instruction, mean_hidden_states, read_embeddings
from dft.selection.ifd_seed import IfdSeedConfig, draw, how_to_go_on, ifd_seed
from dft.selection.inputs import find_inputs
from dft.selection.k_center import k_center_greedy
from dft.selection.method import apply
from dft.selection.model_flags import ModelFlags
from dft.selection.scoring_model import ScoringModel, load_scoring_model
from scripts import select_data
from tests.helpers import write_jsonl


@pytest.fixture
def conversations(chat_file):
    return list(load_conversations([str(chat_file)]))


@pytest.fixture
def flags(tiny_model, tmp_path) -> ModelFlags:
    return ModelFlags(tiny_model, device="cpu", tokens_at_once=200, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("is_padded", [False, True])
def test_hidden_states_are_those_of_one_row_after_the_other(conversations, flags, is_padded):
    model = load_scoring_model(flags.directory, "cpu")
    asked = ScoringModel(model.name, model.model, model.base, model.tokenizer, model.device, is_padded)
    texts = [instruction(row) for row in conversations]
    found = mean_hidden_states(texts, asked, tokens_at_once=200, cache=flags.cache_dir)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model.model(ids, output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(found[0] - found[20]).max() > 0.1


def test_the_instruction_is_what_users_say(conversations):
    assert instruction(conversations[20]).count("\n\n") == 1
    assert conversations[20].messages[0]["content"] in instruction(conversations[20])
    assert conversations[20].messages[1]["content"] not in instruction(conversations[20])


def test_picks_by_a_model_are_those_of_k_center_greedy(conversations, flags, tmp_path):
    seeds = write_jsonl(tmp_path / "seeds.jsonl", [json.loads(row.row) for row in conversations[:3]])
    config = DiversityConfig(flags, num_rows=6, seed_files=find_inputs([str(seeds)], "seed_files"))
    kept, dropped = apply(conversations, diversity(config))
    embeddings = embed([instruction(row) for row in conversations], flags, 8192)
    picks = k_center_greedy(embeddings, 6, seeds=embeddings[:3]).picks
    assert [row.line for row in kept] == sorted((picks + 1).tolist())
    assert {row.reason for row in dropped} == {"covered"}
    assert not {row.line for row in kept} & {1, 2, 3}


def test_the_program_takes_embeddings_of_a_file(chat_file, tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(40, 5))
    np.save(tmp_path / "e.npy", embeddings)
    np.save(tmp_path / "seeds.npy", embeddings[:2])
    flags = [
        "--data_files",
        chat_file,
        "--embeddings",
        tmp_path / "e.npy",
        "--seed_embeddings",
        tmp_path / "seeds.npy",
    ]
    select_data.main(["diversity", *map(str, flags), "--num_rows", "7", "--output", str(tmp_path / "out")])
    picks = [json.loads(line) for line in (tmp_path / "out" / "picks.jsonl").read_text().splitlines()]
    expected = k_center_greedy(embeddings, 7, seeds=embeddings[:2])
    assert [pick["line"] for pick in picks] == (expected.picks + 1).tolist()
    assert [pick["distance"] for pick in picks] == pytest.approx(expected.distances, abs=1e-5)


def test_embeddings_that_do_not_fit_are_refused(conversations, tmp_path):
    path = tmp_path / "e.npy"
    config = DiversityConfig(embeddings=path, num_rows=2)
    for array, message in (
        (np.zeros((39, 4)), "39 rows for 40 valid rows"),
        (np.zeros(40), r"holds float64 \[40\]"),
        (np.zeros((40, 4), dtype=int), "holds int64"),
        (np.array([["a"]], dtype=object), "not a file of numpy.save"),
        (np.where(np.arange(160).reshape(40, 4) == 81, np.nan, 0.0), "1 of 40 are NaN or infinite, row 20"),
    ):
        np.save(path, array)
        with pytest.raises(UserError, match=message):
            apply(conversations, diversity(config))
    for content in (b"", b"PK\x03\x04broken", b"PK\x05\x06"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a file of numpy.save"):
            apply(conversations, diversity(config))
    path.unlink()
    with pytest.raises(UserError, match="not a file of numpy.save"):
        apply(conversations, diversity(config))


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", ">f8", "longdouble"])
def test_embeddings_of_every_kind_of_number_are_read(tmp_path, kind):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "e.npy", array.astype(kind))
    found = read_embeddings(tmp_path / "e.npy", "--embeddings")
    assert (found.dtype, found.dtype.isnative) == (np.float32, True)
    np.testing.assert_array_equal(found, array)
    assert len(k_center_greedy(found, 2).picks) == 2


def test_rows_without_an_instruction_are_dropped(flags, tmp_path):
    answer = {"role": "assistant", "content": "Hello."}
    rows = [{"messages": [answer]}, {"messages": [{"role": "user", "content": "Who?"}, answer]}]
    conversations = list(load_conversations([str(write_jsonl(tmp_path / "rows.jsonl", rows))]))
    for decide in (diversity(DiversityConfig(flags, num_rows=2)), ifd_seed(IfdSeedConfig(flags))):
        kept, dropped = apply(conversations, decide)
        assert [row.line for row in kept] == [2]
        assert [row.reason for row in dropped] == ["no_instruction"]
        with pytest.raises(UserError, match="has an instruction"):
            apply(conversations[:1], decide)


def test_rows_of_each_cluster_are_drawn(conversations, flags):
    cluster = np.array([0, 0, 0, 2, -1, 2, 2, 3])
    chosen = draw(cluster, 2, np.random.default_rng(0))
    assert [int(chosen[cluster == number].sum()) for number in (-1, 0, 2, 3)] == [0, 2, 2, 1]
    config = IfdSeedConfig(flags, warmup_clusters=4, warmup_rows=2)
    kept, dropped = apply(conversations, ifd_seed(config))
    assert 4 <= len(kept) <= 8
    assert {row.reason for row in dropped} == {"not_drawn"}
    assert [row.line for row in apply(conversations, ifd_seed(config))[0]] == [row.line for row in kept]


def test_a_missing_package_is_told_with_its_remedy(conversations, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    (tmp_path / "modules.json").write_text("[]")
    config = DiversityConfig(ModelFlags(tmp_path, device="cpu"), num_rows=2)
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        apply(conversations, diversity(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 2}, "one of --model and --embeddings"),
        ({"embeddings": "e.npy"}, "give --num_rows, --radius or both"),
        ({"embeddings": "e.npy", "num_rows": 0}, "--num_rows 0"),
        ({"embeddings": "e.npy", "radius": float("nan")}, "--radius nan"),
        ({"embeddings": "e.npy", "num_rows": 1, "seed_files": ["s"]}, "--seed_files need a --model"),
        ({"model": ModelFlags(None), "num_rows": 1, "seed_embeddings": "s"}, "--seed_embeddings belong"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DiversityConfig(**settings)


def test_the_command_that_trains_can_be_pasted(flags):
    with pytest.raises(UserError, match="--seed -1 must be at least 0"):
        IfdSeedConfig(flags, seed=-1)
    config = IfdSeedConfig(ModelFlags(Path("my model")), kept="my rows/kept")
    words = shlex.split(how_to_go_on(config).partition(": ")[2])
    assert words[2:6] == ["--model_name_or_path", "my model", "--data_files", "my rows/kept"]
