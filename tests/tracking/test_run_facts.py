"""What is kept of a run: run.json, and the model card."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version

import pytest
import yaml
from transformers import TrainerState, TrainingArguments

from dft.config.adapters import AdapterConfig
from dft.config.data import DataConfig
from dft.config.loss import LossConfig
from dft.config.model import ModelConfig
from dft.errors import UserError
from dft.tracking.model_card import MARK, model_card, write_card
from dft.tracking.run_info import about_run, read_run, write_run

ENTRY = {"path": "some/chats|1.jsonl", "rows_read": 1200, "kept": 1000, "tokens": 50_000, "supervised_tokens": 9_000}
REPORT = {"files": [ENTRY], "total": ENTRY}
HISTORY = [
    {"step": 10, "ce_loss": 2.0, "train/avg_p_correct": 0.5},
    {"step": 10, "eval_ce_loss": 1.9, "eval_perplexity": 6.7, "eval_avg_p_correct": 0.51, "eval_acc": 0.6},
    {"step": 20, "ce_loss": 1.0, "train/avg_p_correct": 0.75},
]
STATE = TrainerState(log_history=HISTORY)


@dataclass
class Arguments(TrainingArguments):
    """With those of the flags that TrainingArguments hasn't."""

    max_tokens_per_batch: int | None = None
    batching: str | None = None


@pytest.fixture
def args(tmp_path):
    return Arguments(output_dir=str(tmp_path / "my-model"), use_cpu=True, report_to="none", warmup_steps=0.05, seed=7)


def facts(args, base="Qwen/Qwen3-8B", data=None, adapters=None, **dft):
    settings = {
        "model": ModelConfig(base),
        "adapters": AdapterConfig(**(adapters or {})),
        "data": DataConfig(["some"], **(data or {})),
        "dft": LossConfig(**dft),
    }
    num_rows = {"training": 950, "evaluation": 50}
    return about_run({name: asdict(group) for name, group in settings.items()}, args, REPORT, num_rows)


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


def test_keys_are_not_kept(monkeypatch, args):
    words = ["train_dft.py", "--hub_token", "hf_1", "--hub-token=hf_2", "--my_api_key", "k3", "--data_files", "a_key"]
    monkeypatch.setattr(sys, "argv", words)
    assert (
        facts(args)["command_line"]
        == "train_dft.py --hub_token HIDDEN --hub-token=HIDDEN --my_api_key HIDDEN --data_files a_key"
    )


@pytest.mark.parametrize("text", ['{"dft": ', "[]"])
def test_a_broken_file_is_said(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run.json can't be read .* mend it, or move it away"):
        read_run(tmp_path)


def test_code_that_was_changed_is_said_so(monkeypatch, args, tmp_path):
    """Only of a repository that holds it: code installed inside another one's directory has no commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "run_facts.py").write_text("x")
    monkeypatch.setattr("dft.tracking.run_info.__file__", str(tmp_path / "run_facts.py"))
    assert facts(args)["git_commit"] is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    commit = facts(args)["git_commit"]
    assert len(commit) == 40
    (tmp_path / "run_facts.py").write_text("y")
    assert facts(args)["git_commit"] == f"{commit}-dirty"


def test_code_outside_a_repository_has_no_commit(monkeypatch, args, tmp_path):
    monkeypatch.setattr("dft.tracking.run_info.__file__", str(tmp_path / "run_facts.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    about = facts(args)
    assert about["git_commit"] is None
    assert "at commit" not in model_card(about, REPORT, args, STATE)


def test_the_card_of_a_run_in_stages_lists_them(args):
    stage = {"name": "general", "steps": 6, "rows": 48, "sources": {"tools|en": {"times_seen": 0.125}}}
    card = model_card(facts(args), REPORT | {"stages": [stage]}, args, STATE)
    assert "950 rows were trained on in stages, 50 evaluated on" in card
    assert "\n\n| stage | steps | rows |" in card
    assert "\n| general | 6 | 48 | tools¦en × 0.125 |\n\n## Training\n" in card
    assert "stage" not in model_card(facts(args), REPORT, args, STATE)


def test_the_card_says_what_the_model_is_made_of(args):
    card = model_card(facts(args, dft_alpha=0.7, dft_floor=0.4), REPORT, args, STATE)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "Qwen/Qwen3-8B"
    assert head["library_name"] == "transformers"
    for text in (
        "# my-model\n",
        "`Qwen/Qwen3-8B`, fine-tuned with the DFT loss",
        "here α = 0.7.",
        "| chats¦1.jsonl | 1,200 | 1,000 | 50,000 | 9,000 |",
        "950 rows were trained on in an epoch, 50 evaluated on, held out.",
        "| num_train_epochs | 3.0 |",
        "| dft_alpha | 0.7 |",
        "| dft_floor | 0.4 |",
        "| warmup_ratio | 0.05 |",
        "| seed | 7 |",
        "| cross-entropy, training | 2.0000 (step 10) | 1.0000 (step 20) |",
        "| perplexity, evaluation | 6.7000 (step 10) | 6.7000 (step 10) |",
        "those of the last step",
        "down to 0.4 of that",
    ):
        assert text in card, text


def test_the_card_of_an_adapter_says_what_it_is(args):
    lora = {"use_peft": True, "lora_r": 8, "load_in_4bit": True}
    about = facts(args, adapters=lora) | {"trained_parameters": "10 of 1,000 (1.00%)"}
    card = model_card(about, REPORT, args, STATE)
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["tags"][-1]) == ("peft", "lora")
    assert "\nLoRA adapter on `Qwen/Qwen3-8B`, fine-tuned with the DFT loss" in card
    for text in (
        "| lora_r | 8 |",
        "| lora_target_modules | all linear layers but the head |",
        "adapters | nf4 |",
        "| trained parameters | 10 of 1,000 (1.00%) |",
    ):
        assert text in card
    more = model_card(facts(args, adapters={"adapter": "/private/first"}), REPORT, args, STATE)
    assert "| adapter that was gone on from | first |" in more
    assert "lora_r" not in more
    assert "lora" not in model_card(facts(args), REPORT, args, STATE)


def test_the_card_gives_the_results_of_the_weights_that_are_saved(args):
    args.load_best_model_at_end, args.metric_for_best_model = True, "eval_ce_loss"
    history = [{"step": step, "eval_ce_loss": ce} for step, ce in ((10, 3.0), (20, 1.0), (30, 2.0))]
    history.append({"step": 30, "ce_loss": 0.5})
    best = TrainerState(log_history=history, best_global_step=20, best_model_checkpoint="checkpoint-20")
    card = model_card(facts(args), REPORT, args, best)
    assert "|  | first | these weights | last |" in card
    assert "| cross-entropy, evaluation | 3.0000 (step 10) | 1.0000 (step 20) | 2.0000 (step 30) |" in card
    assert "| cross-entropy, training | 0.5000 (step 30) |  | 0.5000 (step 30) |" in card
    assert "The weights are those of step 20, the checkpoint with the best eval_ce_loss." in card


def test_the_card_of_plain_fine_tuning_does_not_speak_of_dft(args, tmp_path):
    """Its base model is a directory, which is no name on the hub and nobody's business."""
    (tmp_path / "private" / "base").mkdir(parents=True)
    settings = {"data": {"eval_data_files": [str(tmp_path / "own.jsonl")]}, "use_simple_dft": False}
    about = facts(args, base=str(tmp_path / "private" / "base"), **settings)
    args.max_steps = 40
    card = model_card(about, REPORT, args, TrainerState())
    assert "`base`, fine-tuned with plain cross-entropy (SFT).\n" in card
    assert "DFT sharpens" not in card
    assert "50 evaluated on, from own.jsonl." in card
    assert "| max_steps | 40 |" in card
    assert "num_train_epochs" not in card
    assert "base_model" not in card
    assert str(tmp_path) not in card


def test_a_card_of_somebody_elses_is_kept(args, tmp_path, caplog):
    path = tmp_path / "my-model" / "README.md"
    path.parent.mkdir()
    write_card(facts(args), REPORT, args, STATE)
    assert MARK in path.read_text()
    write_card(facts(args, dft_alpha=0.25), REPORT, args, STATE)
    assert "here α = 0.25." in path.read_text()
    path.write_text("My own words.")
    write_card(facts(args), REPORT, args, STATE)
    assert path.read_text() == "My own words."
    assert "no model card is written" in caplog.text
