"""Runs that go on from a checkpoint, or are refused to; and runs that only evaluate."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.make_example_data import facts_en
from tests.helpers import Outcome, read_log, run_programs, tiny_run, write_jsonl

pytestmark = pytest.mark.launch

BASE = ("--save_steps", 2, "--eval_steps", 2, "--save_total_limit", 1, "--bf16_full_eval", "True", "--max_steps", 4)
BASE += ("--learning_rate", 1e-2)
ON = ("--resume_from_checkpoint", "CHECKPOINT", "--max_steps", 5)
# flags after those of the run that is resumed
RESUMED = {
    "longer": (*ON, "--logging_steps", 2, "--save_steps", 1),
    "at its end": ("--resume_from_checkpoint", "CHECKPOINT"),
    "the same steps in smaller batches": (
        *(*ON, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2),
    ),
    "other data all the same": (*ON, "--data_files", "MORE", "--resume_anyway", "True"),
    "from an older version": ("--resume_from_checkpoint", "OLDER", "--max_steps", 5, "--dft_alpha", 0.5),
}
REFUSED = {  # what the message says
    "other data": ((*ON, "--data_files", "MORE"), ["training_rows: checkpoint 38, now 19", "content_of_rows"]),
    "other settings": (
        (*ON, "--dft_alpha", 0.5, "--batching", "packed", "--max_length", 512, "--seed", 3, "--learning_rate", 1e-3),
        [
            *("dft_alpha: checkpoint 1.0, now 0.5", "now packed", "max_length: checkpoint 8192, now 512", "now 3"),
            "learning_rate: checkpoint 0.01, now 0.001",
        ],
    ),
    "a damaged optimizer": (
        ("--resume_from_checkpoint", "DAMAGED", "--max_steps", 5),
        ["DAMAGED/optimizer.pt: ", "DAMAGED/rng_state.pth: ", "bytes, ", "were written"],
    ),
}
EVALUATIONS = {"evaluation": ("--do_train", "False", "--model_name_or_path", "BASE")}


@pytest.fixture(scope="module")
def places(tiny_model, chat_file, tmp_path_factory) -> dict[str, Path]:
    """A finished run (BASE), its last checkpoint, and that checkpoint as it may be found."""
    directory = tmp_path_factory.mktemp("going_on")
    command = ["train_dft.py", *tiny_run(tiny_model, chat_file, directory / "base"), *BASE]
    outcome = run_programs({"base": command}, directory / "outcomes")["base"]
    assert outcome.status == 0, outcome.output
    checkpoint = directory / "base" / "checkpoint-4"
    for name in ("older", "damaged"):
        shutil.copytree(checkpoint, directory / name)
    (directory / "older" / "manifest.json").unlink()
    for name in ("optimizer.pt", "rng_state.pth"):
        path = directory / "damaged" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    more = write_jsonl(directory / "more.jsonl", facts_en()[20:40])
    names = {"BASE": directory / "base", "CHECKPOINT": checkpoint, "MORE": more}
    return names | {"OLDER": directory / "older", "DAMAGED": directory / "damaged", "OUT": directory}


@pytest.fixture(scope="module")
def outcomes(places, tiny_model, chat_file) -> dict[str, Outcome]:
    commands = {}
    flags_of = RESUMED | {name: flags for name, (flags, _) in REFUSED.items()} | EVALUATIONS
    for name, flags in flags_of.items():
        words = ["train_dft.py", *tiny_run(tiny_model, chat_file, places["OUT"] / name), *BASE, *flags]
        commands[name] = [str(places.get(word, word)) for word in words]
    return run_programs(commands, places["OUT"] / "outcomes")


def test_a_run_saves_what_it_has_trained_and_keeps_the_best_and_the_newest(places):
    """With evaluations in 16 bits and a single checkpoint to keep."""
    saved = load_file(places["BASE"] / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    newest = load_file(places["CHECKPOINT"] / "model.safetensors")
    assert all(torch.equal(saved[name], newest[name]) for name in newest)
    state = json.loads((places["BASE"] / "trainer_state.json").read_text())
    kept = {Path(path).name for path in places["BASE"].glob("checkpoint-*")}
    assert kept == {"checkpoint-4", Path(state["best_model_checkpoint"]).name}
    assert not (places["BASE"] / "manifest.json").exists()
    model = AutoModelForCausalLM.from_pretrained(places["BASE"])
    assert 2 in torch.as_tensor(model.generation_config.eos_token_id)  # <|im_end|>
    assert model.config.use_cache


@pytest.mark.parametrize("name", RESUMED)
def test_it_goes_on(outcomes, places, name):
    outcome = outcomes[name]
    assert outcome.status == 0, outcome.output
    steps = [record["step"] for record in read_log(places["OUT"] / name) if "train_runtime" in record]
    assert steps == [4 if name == "at its end" else 5]
    assert (places["OUT"] / name / "model.safetensors").is_file()
    assert ("was made with other data or settings" in outcome.output) == (name == "other data all the same")
    assert ("doesn't say what it was made with" in outcome.output) == (name == "from an older version")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_the_model_is_loaded(outcomes, places, name):
    outcome = outcomes[name]
    assert outcome.status == 2, outcome.output
    for message in REFUSED[name][1]:
        assert message.replace("DAMAGED", str(places["DAMAGED"])) in outcome.output
    assert ("--resume_anyway True" in outcome.output) == name.startswith("other")
    assert "Model: " not in outcome.output
    assert "Traceback" not in outcome.output
    assert not (places["OUT"] / name / "run.json").exists()


def test_an_evaluation_trains_and_saves_nothing(outcomes, places):
    outcome = outcomes["evaluation"]
    assert outcome.status == 0, outcome.output
    out = places["OUT"] / "evaluation"
    results, trained = (json.loads((path / "eval_results.json").read_text()) for path in (out, places["BASE"]))
    assert results["eval_ce_loss"] == pytest.approx(trained["eval_ce_loss"], rel=1e-2)  # one of them in 16 bits
    assert {path.name for path in out.iterdir()} == {
        *("all_results.json", "eval_results.json", "train_distributed.log"),
        *("data_report.json", "data_report.html", "rejected.jsonl"),
    }
    assert "step 1/" not in outcome.output
