"""What a run under ZeRO-3 leaves: a whole model, checkpoints to resume from, the best of them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.checkpoints.resume import find_checkpoint
from dft.errors import UserError
from tests.helpers import read_log

pytestmark = pytest.mark.launch

ZERO3 = {"LAUNCHER": "deepspeed", "NPROC": "2"}
WEIGHTED = "The cross-entropy of each assistant token is weighted by α·w + 1 − α with w ="
TIMING = ("tokens_per_second", "supervised_tokens_per_second", "memory_gib")


# ---- a whole model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(train_in, tmp_path_factory) -> SimpleNamespace:
    """A run with checkpoints of the model alone: its `out` directory, its `output` on the terminal."""
    directory = tmp_path_factory.mktemp("finished")
    flags = ("--dft_alpha", 0.7, "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 1, "--fused_loss", "on")
    flags += ("--save_only_model", 1, "--learning_rate", 1e-2, "--report_to", "tensorboard")
    shared_memory = set(Path("/dev/shm").glob("deepspeed_*"))
    result = train_in(directory, *flags, **ZERO3)
    left = set(Path("/dev/shm").glob("deepspeed_*")) - shared_memory
    return SimpleNamespace(out=directory / "out", output=result.stdout, shared_memory_left=left)


def test_the_saved_model_is_whole_and_trained(finished, tiny_model):
    original = load_file(tiny_model / "model.safetensors")
    saved = load_file(finished.out / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in original.items()}
    assert all(t.numel() and not torch.equal(t, original[n]) for n, t in saved.items())
    model = AutoModelForCausalLM.from_pretrained(finished.out, dtype=torch.float32)
    assert all(torch.equal(t, saved[n]) for n, t in model.state_dict().items() if n in saved)


def test_the_last_checkpoint_is_the_saved_model_and_holds_no_optimizer(finished):
    (checkpoint,) = finished.out.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (checkpoint, finished.out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (checkpoint / "optimizer.pt").exists()


def test_the_saved_tokenizer_has_the_template_of_the_training(finished):
    chat = AutoTokenizer.from_pretrained(finished.out).apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_a_run_leaves_the_files_that_are_promised_and_no_pickle(finished):
    files = {path.name for path in finished.out.iterdir()}
    assert files >= {
        *("train_log.jsonl", "training_curves.png", "all_results.json", "trainer_state.json", "training_args.json"),
        *("data_report.json", "data_report.html", "rejected.jsonl", "train_distributed.log", "runs"),
    }
    assert not {"training_args.bin", "tokenized"} & files  # no pickle, nothing left over
    assert not finished.shared_memory_left


def test_records_and_results_hold_the_metrics(finished):
    training = [r for r in read_log(finished.out) if "ce_loss" in r]
    assert [r["step"] for r in training] == [1, 2]
    for record in training:
        assert record["train/dft_alpha"] == 0.7
        assert record["loss"] < record["ce_loss"]
        assert 0 < record["train/avg_p_correct"] < 1
        assert record["tokens_per_second"] > record["supervised_tokens_per_second"] > 0
        assert record["memory_gib"] > 0
    evaluation = json.loads((finished.out / "all_results.json").read_text())
    assert evaluation["eval_perplexity"] == pytest.approx(2.718281828 ** evaluation["eval_ce_loss"])
    assert "Done: 2 steps" in finished.output
    assert "Loss: the head is fused with the loss" in finished.output


def test_a_saved_model_is_evaluated_alone(finished, train, tmp_path):
    """The engine that DeepSpeed makes for it has never been trained."""
    train("--model_name_or_path", finished.out, "--do_train", "False", "--dft_alpha", 0.7, **ZERO3)
    ours, theirs = (json.loads((out / "eval_results.json").read_text()) for out in (tmp_path / "out", finished.out))
    for name in ("eval_ce_loss", "eval_loss", "eval_acc", "eval_avg_p_correct"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_saved_model_stops_where_turns_end(finished):
    for directory in (finished.out, finished.out / "checkpoint-2"):
        stops_at = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
        assert 2 in (stops_at if isinstance(stops_at, list) else [stops_at])  # <|im_end|>
        assert json.loads((directory / "config.json").read_text())["use_cache"] is True


# ---- resuming -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_and_resumed(train_in, tmp_path_factory) -> tuple[Path, Path]:
    """The output of a run of 4 steps, and that of one resumed from its step 3, which is in the second epoch."""
    whole, resumed = (tmp_path_factory.mktemp(name) for name in ("whole", "resumed"))
    flags = ("--max_steps", 4, "--save_steps", 3, "--learning_rate", 1e-2, "--gradient_accumulation_steps", 2)
    flags += ("--dft_alpha_warmup_ratio", 1.0, "--loss_normalization", "turn", "--dft_special_tokens", "ce")
    flags += ("--batching", "packed", "--max_length", 512, "--per_device_train_batch_size", 1)
    flags += ("--objective", "anchored", "--objective_args", "strength=0.5", "--reference_cache_dir")
    train_in(whole, *flags, whole / "cache", **ZERO3)
    checkpoint = ("--resume_from_checkpoint", whole / "out" / "checkpoint-3")
    # what the starting weights said is beside the checkpoint
    train_in(resumed, *flags, resumed / "cache", *checkpoint, **ZERO3)
    return whole / "out", resumed / "out"


def test_resumed_equals_uninterrupted_bit_for_bit(whole_and_resumed):
    """The order of the second epoch is another than the first's. The processor computes the same things twice."""
    whole, resumed = whole_and_resumed
    assert json.loads((whole / "data_report.json").read_text())["total"]["steps_per_epoch"] == 2
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def last_records(directory: Path) -> list[dict]:
        records = [r for r in read_log(directory) if "ce_loss" in r and r["step"] > 3]
        return [{k: v for k, v in r.items() if k not in TIMING} for r in records]

    assert last_records(resumed) == last_records(whole)
    assert [record["train/dft_alpha"] for record in last_records(whole)] == [0.75]


def test_an_anchored_run_says_what_it_is_and_keeps_what_it_is_held_by(whole_and_resumed):
    whole, resumed = whole_and_resumed
    formula = "p + strength * (min(p_ref / p, max_ratio) - 1) (strength 0.5, max_ratio 10)"
    log = (whole / "train_distributed.log").read_text()
    assert f"Loss: objective anchored, weight {formula}, alpha 1" in log
    assert log.count("log-probabilities by the starting weights, ") == 2  # of the training and the evaluation rows
    assert "log-probabilities by the starting weights, " not in (resumed / "train_distributed.log").read_text()
    kept = [whole / "reference", whole.parent / "cache", resumed / "reference", resumed.parent / "cache"]
    assert [len(list(directory.iterdir())) for directory in kept] == [2, 2, 2, 2]
    assert f"the objective anchored of the DFT family. {WEIGHTED} `{formula}`" in (whole / "README.md").read_text()
    assert all("ratio_clipped" in r for r in read_log(whole) if "ce_loss" in r)


def test_last_is_the_newest_whole_checkpoint_of_the_output_directory(whole_and_resumed, tmp_path):
    """All parts of it are in its manifest; and only what has written them can load them."""
    out = Path(shutil.copytree(whole_and_resumed[0], tmp_path / "out"))
    files = json.loads((out / "checkpoint-4" / "manifest.json").read_text())["files"]
    parts = [name for name in files if name.endswith("optim_states.pt")]
    assert len(parts) == 2
    assert {"model.safetensors", "latest", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= files.keys()
    settings = {"resume_from_checkpoint": "last", "output_dir": str(out), "max_steps": 4, "num_train_epochs": 3.0}
    settings |= {"deepspeed_plugin": SimpleNamespace(zero_stage=3), "fsdp_plugin_args": None, "world_size": 2}
    assert find_checkpoint(SimpleNamespace(**settings)) == (str(out / "checkpoint-4"), 4)
    for flags, line in (
        ({"world_size": 1}, "world_size: checkpoint 2, now 1"),
        ({"deepspeed_plugin": None}, "engine: checkpoint deepspeed, now torch"),
    ):
        with pytest.raises(UserError, match=line):
            find_checkpoint(SimpleNamespace(**settings | flags))
    part = out / "checkpoint-4" / parts[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert find_checkpoint(SimpleNamespace(**settings)) == (str(out / "checkpoint-3"), 3)


# ---- the best checkpoint ------------------------------------------------------------------------


def test_the_best_checkpoint_is_kept_and_its_results_are_the_results(train, chat_file, tmp_path):
    """The first step has a learning rate of 0 and the others ruin the model: the oldest checkpoint is the best."""
    flags = ("--max_steps", 4, "--save_steps", 1, "--save_total_limit", 2, "--warmup_steps", 1, "--learning_rate", 1.0)
    flags += ("--metric_for_best_model", "eval_ce_loss", "--eval_data_files", chat_file)
    result = train(*flags, "--load_best_model_at_end", "True", **ZERO3)
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    evaluations = {r["step"]: r["eval_ce_loss"] for r in state["log_history"] if "eval_ce_loss" in r}
    assert min(evaluations, key=evaluations.get) == 1
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-1"
    assert "checkpoint-1 (" in result.stdout
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_ce_loss"] == pytest.approx(evaluations[1])
    assert results["eval_ce_loss"] < evaluations[2]
