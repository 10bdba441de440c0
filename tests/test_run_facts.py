"""What is kept of a run: run.json, and the model card."""

import json
import sys
from dataclasses import dataclass
from importlib.metadata import version

import pytest
import yaml
from transformers import TrainingArguments

from arguments import DataArguments, DFTArguments, ModelArguments
from model_card import MARK, model_card, write_card
from run_facts import about_run, read_run, write_run

ENTRY = {"path": "some/chats|1.jsonl", "rows_read": 1200, "kept": 1000, "tokens": 50_000, "supervised_tokens": 9_000}
REPORT = {"files": [ENTRY], "total": {**ENTRY, "training_rows_per_epoch": 950}}
HISTORY = [
    {"step": 10, "ce_loss": 2.0, "train/avg_p_correct": 0.5},
    {"step": 10, "eval_ce_loss": 1.9, "eval_perplexity": 6.7, "eval_avg_p_correct": 0.51, "eval_acc": 0.6},
    {"step": 20, "ce_loss": 1.0, "train/avg_p_correct": 0.75},
]


@dataclass
class Arguments(TrainingArguments):
    """With those of the flags that TrainingArguments hasn't."""

    max_tokens_per_batch: int | None = None


@pytest.fixture
def args(tmp_path):
    return Arguments(output_dir=str(tmp_path / "my-model"), use_cpu=True, report_to="none", warmup_steps=0.05, seed=7)


def facts(args, base="Qwen/Qwen3-8B", data=None, **dft):
    settings = {
        "model": ModelArguments(base),
        "data": DataArguments(["some"], **(data or {})),
        "dft": DFTArguments(**dft),
    }
    return about_run({name: vars(some) for name, some in settings.items()}, args, REPORT)


def test_what_is_recorded_of_a_run(monkeypatch, args, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_dft.py", "--data_files", "a b.jsonl"])
    about = facts(args, dft_alpha=0.7)
    assert (about["dft"]["dft_alpha"], about["data"]["max_length"]) == (0.7, 8192)
    assert about["data_rows"] == {"some/chats|1.jsonl": 1000}
    assert about["versions"]["torch"] == version("torch")
    assert about["command_line"] == "train_dft.py --data_files 'a b.jsonl'"
    write_run(about, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    assert read_run(tmp_path) == read_run(tmp_path / "checkpoint-3") == json.loads(json.dumps(about))
    assert read_run(tmp_path / "checkpoint-3" / "deeper") == {}


def test_code_outside_a_repository_has_no_commit(monkeypatch, args, tmp_path):
    monkeypatch.setattr("run_facts.__file__", str(tmp_path / "run_facts.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    about = facts(args)
    assert about["git_commit"] is None
    assert "at commit" not in model_card(about, REPORT, args, HISTORY)


def test_the_card_says_what_the_model_is_made_of(args):
    card = model_card(facts(args, dft_alpha=0.7, dft_floor=0.4), REPORT, args, HISTORY)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen3-8B"
    assert head["library_name"] == "transformers"
    for text in (
        "# my-model\n",
        "`Qwen/Qwen3-8B`, fine-tuned with the DFT loss",
        "here α = 0.7.",
        "| chats¦1.jsonl | 1,200 | 1,000 | 50,000 | 9,000 |",
        "950 rows were trained on in an epoch; 5 % of the rows were held out",
        "| dft_floor | 0.4 |",
        "| warmup_ratio | 0.05 |",
        "| seed | 7 |",
        "| cross-entropy, training | 2.0000 (step 10) | 1.0000 (step 20) |",
        "| perplexity, evaluation | 6.7000 (step 10) | 6.7000 (step 10) |",
        "those of the last step",
        "down to 0.4 of that",
    ):
        assert text in card, text


def test_the_card_of_plain_fine_tuning_does_not_speak_of_dft(args, tmp_path):
    """Its base model is a directory, which is no name on the hub and nobody's business."""
    (tmp_path / "private" / "base").mkdir(parents=True)
    settings = {"data": {"validation_split_percentage": 0.0}, "use_simple_dft": False}
    about = facts(args, base=str(tmp_path / "private" / "base"), **settings)
    card = model_card(about, REPORT, args, [])
    assert "`base`, fine-tuned with plain cross-entropy (SFT).\n" in card
    assert "DFT sharpens" not in card
    assert "none were held out" in card
    assert "base_model" not in card
    assert str(tmp_path) not in card


def test_a_card_of_somebody_elses_is_kept(args, tmp_path, caplog):
    path = tmp_path / "my-model" / "README.md"
    path.parent.mkdir()
    write_card(facts(args), REPORT, args, HISTORY)
    assert MARK in path.read_text()
    write_card(facts(args, dft_alpha=0.25), REPORT, args, HISTORY)
    assert "here α = 0.25." in path.read_text()
    path.write_text("My own words.")
    write_card(facts(args), REPORT, args, HISTORY)
    assert path.read_text() == "My own words."
    assert "no model card is written" in caplog.text
