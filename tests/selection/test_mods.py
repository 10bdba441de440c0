"""MoDS chooses what its steps, done one after the other by hand, choose."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from data_utils import load_conversations
from dft.errors import UserError
from dft.reading.rows import Conversation
from dft.selection import answers, mods_report
from dft.selection.answers import answer_rows
from dft.selection.embeddings import embed, instruction
from dft.selection.k_center import k_center_greedy
from dft.selection.model_flags import ModelFlags
from dft.selection.mods import ModsConfig, mods
from dft.selection.mods_training import SeedTraining
from scripts import select_data
from tests.helpers import CHATML_TEMPLATE, write_jsonl

REWARD = BertConfig(
    vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, initializer_range=0.3, id2label={0: "score"},
)  # fmt: skip
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def conversations(chat_file, tmp_path_factory) -> list[Conversation]:
    """Of different instructions, but for the last one, which has none."""
    silent = {"messages": [{"role": "system", "content": "Be."}, {"role": "assistant", "content": "I am."}]}
    path = write_jsonl(tmp_path_factory.mktemp("more") / "more.jsonl", [silent])
    first = {instruction(row): row for row in reversed(list(load_conversations([str(chat_file)])))}
    return [*reversed(first.values()), *load_conversations([str(path)])]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tiny_model):
    """Directory of a random reward model that sees pairs of texts."""
    directory = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(REWARD).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def initial_model(tmp_path_factory, tiny_model):
    """Directory of a random model that says different things to different prompts."""
    directory = tmp_path_factory.mktemp("initial")
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    config.initializer_range = 0.3
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tiny_model, reward_model, initial_model, cache, tmp_path) -> ModsConfig:
    base = ModelFlags(tiny_model, device="cpu", cache_dir=cache)
    return ModsConfig(
        reward_model=replace(base, directory=reward_model, tokens_at_once=400),
        embedding_model=base,
        training=SeedTraining(base, tmp_path / "work"),
        alpha=-10.0,
        beta=10.0,
        seed_rows=5,
        augmented_rows=4,
        initial_model=replace(base, directory=initial_model),
        max_new_tokens=NEW_TOKENS,
        generated_at_once=200,
    )


def score(row: Conversation, model, tokenizer) -> float:
    """The score of one row, alone in its batch."""
    with torch.no_grad():
        return float(model(**tokenizer(*pair_of(row), return_tensors="pt")).logits[0, 0])


def pair_of(row: Conversation) -> tuple[str, str]:
    """What the reward model sees of a row."""
    return "\n\n".join(m["content"] for m in row.messages[:-1] if m["content"]), row.messages[-1]["content"]


def said(row: Conversation, model, tokenizer) -> str:
    """The answer to one row, alone in its batch."""
    text = tokenizer.apply_chat_template(row.messages[:-1], row.tools, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=0)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def by_hand(conversations, reward_model, initial_model) -> dict:
    """Scores and answers of all rows, one after the other."""
    model, tokenizer = (kind.from_pretrained(initial_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    answers = [said(row, model.eval(), tokenizer) for row in conversations]
    assert len(set(answers)) > 20
    model, tokenizer = (
        kind.from_pretrained(reward_model) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    answered = [
        replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": text}])
        for row, text in zip(conversations, answers, strict=True)
    ]
    of_rows, of_answers = (
        np.array([score(row, model.eval(), tokenizer) for row in rows]) for rows in (conversations, answered)
    )
    return {"answers": answers, "quality": of_rows, "answer_quality": of_answers}


def thresholds(by_hand) -> dict[str, float]:
    """Between scores, so that rounding decides nothing."""
    alpha = float(np.sort(by_hand["quality"])[[9, 10]].mean())
    scores = by_hand["answer_quality"][by_hand["quality"] >= alpha]
    return {"alpha": alpha, "beta": float(np.sort(scores)[[19, 20]].mean())}


def test_the_steps_choose_what_they_choose_by_hand(conversations, config, by_hand):
    config = replace(config, **thresholds(by_hand))
    decision = mods(config)(iter(conversations))
    np.testing.assert_allclose(decision.scores["quality of rows"], by_hand["quality"], rtol=1e-4, atol=1e-4)
    good = np.flatnonzero(by_hand["quality"] >= config.alpha)
    good = good[good != len(conversations) - 1]
    vectors = embed([instruction(conversations[i]) for i in good], config.embedding_model, 8192)
    seeds = good[k_center_greedy(vectors, 5).picks]
    needed = np.flatnonzero((by_hand["answer_quality"] < config.beta) & (by_hand["quality"] >= config.alpha))
    free = np.isin(good, needed) & ~np.isin(good, seeds)
    augmented = good[free][k_center_greedy(vectors[free], 4, seeds=vectors[np.isin(good, seeds)]).picks]
    kept = [i for i, verdict in enumerate(decision.verdicts) if not verdict.reason]
    assert kept == sorted([*seeds.tolist(), *augmented.tolist()])
    assert len(kept) == 9
    assert decision.facts["rows"] == {
        "all": 35, "high quality": 25, "seed": 5, "necessity": 20, "augmented": 4, "result": 9,
    }  # fmt: skip
    assert "all 35 → high quality 25 → seed 5 → necessity 20 → augmented 4 → result 9" in decision.notes[0]
    reasons = {
        "low_quality": [i for i in range(35) if by_hand["quality"][i] < config.alpha],
        "answered_well": [i for i in good if i not in needed and i not in seeds],
        "covered": [i for i in good if i in needed and i not in kept],
    }
    for reason, expected in reasons.items():
        found = [i for i, verdict in enumerate(decision.verdicts) if verdict.reason == reason]
        assert found == expected
        assert found
        name = "quality" if reason == "low_quality" else "answer_quality"
        shown = [decision.verdicts[i].score for i in found]
        np.testing.assert_allclose(shown, by_hand[name][found], rtol=1e-4, atol=1e-4)
    table = decision.tables[mods_report.ANSWERS]
    assert [entry["answer"] for entry in table] == [by_hand["answers"][i] for i in sorted({*good, *needed})]
    assert [entry["set"] for entry in table].count("augmented") == 4


def test_a_run_that_was_cut_generates_the_missing_answers_alone(conversations, config, by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr("dft.selection.model_rows.SHARD_TOKENS", 500)
    flags = replace(config.initial_model, cache_dir=tmp_path)
    first = answer_rows(conversations, flags, NEW_TOKENS, 200)
    assert list(first.texts.values()) == by_hand["answers"]
    shards = sorted(tmp_path.glob("answers_*/*.npz"))
    assert len(shards) > 3
    shards[1].unlink()
    calls = []
    monkeypatch.setattr(answers, "generate_answers", lambda *args: calls.append(args[2]) or GENERATE(*args))
    assert answer_rows(conversations, flags, NEW_TOKENS, 200) == first
    assert 0 < sum(map(len, calls)) < 20
    answer_rows(conversations, flags, NEW_TOKENS + 1, 200)
    assert sum(map(len, calls)) > 35


GENERATE = answers.generate_answers


def test_without_a_model_it_ends_with_the_seed_set_and_says_how_to_train(conversations, config):
    decision = mods(replace(config, initial_model=None))(iter(conversations))
    kept = [row for row, verdict in zip(conversations, decision.verdicts, strict=True) if not verdict.reason]
    assert len(kept) == 5
    seeds = config.training.seed_file
    written = list(load_conversations([str(seeds)]))
    shown = [(row.messages, row.tools, row.template_kwargs) for row in kept]
    assert [(row.messages, row.tools, row.template_kwargs) for row in written] == shown
    assert {verdict.reason for verdict in decision.verdicts} == {"", "not_in_seed", "no_instruction"}
    assert f"--data_files {seeds} --output_dir {config.training.model}" in decision.notes[-1]
    decision = mods(replace(config, seed_rows=6))(iter(conversations))
    assert any("isn't the one that" in note for note in decision.notes)


def test_sets_that_are_too_small_are_told(conversations, config):
    decision = mods(replace(config, seed_rows=1000))(iter(conversations))
    assert decision.facts["rows"] == {
        "all": 35, "high quality": 35, "seed": 34, "necessity": 35, "augmented": 0, "result": 34,
    }  # fmt: skip
    assert any("The seed set has 34 rows, not 1,000" in note for note in decision.notes)
    assert any("The augmented set has 0 rows, not 4" in note for note in decision.notes)
    assert any("34 rows of the necessity set are in the seed set already" in note for note in decision.notes)


def test_a_model_that_needs_nothing_leaves_the_seed_set(conversations, config):
    decision = mods(replace(config, beta=-10.0))(iter(conversations))
    scored = "None of the 35 answers that have a score is below -10: the result is the seed set."
    assert scored in decision.notes
    assert sum(not verdict.reason for verdict in decision.verdicts) == 5
    assert {verdict.reason for verdict in decision.verdicts} == {"", "answered_well", "no_instruction"}


def test_nothing_of_high_quality_keeps_nothing(conversations, config):
    decision = mods(replace(config, alpha=10.0))(iter(conversations))
    assert {verdict.reason for verdict in decision.verdicts} == {"low_quality"}
    assert not config.training.work.exists()


@pytest.mark.parametrize("room", [60, 1])
def test_rows_without_room_for_an_answer_are_dropped_with_a_reason(conversations, config, room, monkeypatch):
    monkeypatch.setattr("dft.selection.answers.longest_prompt", lambda model, new: room)
    decision = mods(config)(iter(conversations))
    dropped = [verdict for verdict in decision.verdicts if verdict.reason == "prompt_too_long"]
    assert dropped
    assert f"with --max_new_tokens the model takes {room}" in dropped[0].detail
    assert any("rows of high quality have no answer with a score" in note for note in decision.notes)
    assert (decision.facts["rows"]["necessity"] == 0) == (room == 1)
    assert ("No answer has a score: the result is the seed set." in decision.notes) == (room == 1)


def test_a_model_without_room_for_any_prompt_is_refused(conversations, config, monkeypatch):
    monkeypatch.setattr("dft.selection.answers.longest_prompt", lambda model, new: 5 - new)
    with pytest.raises(UserError, match=f"--max_new_tokens {NEW_TOKENS} leaves no room .* takes 5 tokens"):
        mods(config)(iter(conversations))


def test_an_answer_that_the_reward_model_does_not_take_is_not_judged(conversations, config, reward_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    lengths = [len(tokenizer(*pair_of(row))["input_ids"]) for row in conversations]
    rows = [row for row, length in zip(conversations, lengths, strict=True) if length < 40]
    rows = [replace(row, messages=[*row.messages[:-1], {"role": "assistant", "content": "!"}]) for row in rows]
    AutoModelForSequenceClassification.from_pretrained(reward_model).save_pretrained(tmp_path / "short")
    tokenizer.model_max_length = max(len(tokenizer(*pair_of(row))["input_ids"]) for row in rows)
    tokenizer.save_pretrained(tmp_path / "short")
    flags = replace(config.reward_model, directory=tmp_path / "short")
    decision = mods(replace(config, reward_model=flags, seed_rows=1))(iter(rows))
    reasons = [verdict.reason for verdict in decision.verdicts]
    assert "answer_not_scored" in reasons
    detail = decision.verdicts[reasons.index("answer_not_scored")].detail
    assert f"more than the {tokenizer.model_max_length} that the reward model is given" in detail


# ---- settings and the program -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": float("nan")}, "--alpha nan must be a finite number"),
        ({"beta": float("inf")}, "--beta inf must be"),
        ({"seed_rows": 0}, "--seed_rows 0 must be at least 1"),
        ({"augmented_rows": -1}, "--augmented_rows -1"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"max_length": 0}, "--max_length is 0"),
    ],
)
def test_settings_out_of_range_are_refused(config, settings, message):
    with pytest.raises(UserError, match=message):
        replace(config, **settings)


def test_a_training_must_be_wanted_and_possible(config, monkeypatch):
    training = replace(config.training, flags=[])
    with pytest.raises(UserError, match="give one of --initial_model and --train_flags"):
        replace(config, training=training)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="can't be used under a launcher of several processes"):
        replace(config, training=training, initial_model=None)


def command_of(config: ModsConfig, data, output) -> list[str]:
    words = [
        *("mods", "--reward_model", config.reward_model.directory, "--model", config.embedding_model.directory),
        *("--data_files", data, "--output", output, "--alpha", -10, "--beta", 10, "--seed_rows", 5),
        *("--augmented_rows", 4, "--max_new_tokens", NEW_TOKENS, "--device", "cpu"),
        *("--cache_dir", config.embedding_model.cache_dir),
    ]
    return list(map(str, words))


def test_the_flags_of_the_program(config, chat_file, tmp_path, capsys):
    command = command_of(config, chat_file, tmp_path / "out")
    with pytest.raises(UserError, match="lies in --output"):
        select_data.main([*command, "--work_dir", str(tmp_path / "out" / "work")])
    with pytest.raises(UserError, match="--train_flags 'a: No closing quotation"):
        select_data.main([*command, "--train_flags", "'a"])
    with pytest.raises(UserError, match="--initial_model .*none is not a directory"):
        select_data.main([*command, "--initial_model", str(tmp_path / "none")])
    select_data.main([*command, "--initial_model", str(config.initial_model.directory)])
    report = json.loads((tmp_path / "out" / "selection_report.json").read_text())
    assert report["total"]["kept"] == 9
    assert report["scores"]["quality of the model's answers"]["count"] == 40
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 40
    assert (tmp_path / "out" / "selection_report.html").read_text().count("<svg") == 2
    assert len((tmp_path / "out.work" / "seed.jsonl").read_text().splitlines()) == 5
    assert "Rows: all 40 → high quality 40 → seed 5" in capsys.readouterr().out


@pytest.mark.launch
def test_the_program_trains_on_the_seed_set_and_uses_that_model(config, chat_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LAUNCHER", "python")
    command = command_of(config, chat_file, tmp_path / "out")
    flags = "--torch_dtype float32 --max_steps 1 --validation_split_percentage 0 --preprocessing_num_workers 1"
    select_data.main([*command, f"--train_flags={flags}"])
    report = json.loads((tmp_path / "out" / "selection_report.json").read_text())
    assert report["total"]["kept"] == 9
    work = tmp_path / "out.work"
    assert (work / "initial" / "model.safetensors").is_file()
    assert json.loads((work / "initial" / "data_report.json").read_text())["total"]["kept"] == 5
    assert "train_dft.py" in (work / "train.log").read_text()
    assert "Command:" in capfd.readouterr().out
    select_data.main([*command, f"--train_flags={flags}", "--overwrite"])
    assert "Command:" not in capfd.readouterr().out  # it was trained before
