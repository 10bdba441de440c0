"""The loss, its gradient and the evaluation don't depend on how the batch is cut into ranks and micro-batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import relative_error, run, run_on
from tests.launch.cases import CASES, ENGINES, HEADS, Engine

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def result_of(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """Gives the result of a case; all cases of its engine are run in one launch, when the first is asked for."""
    directories: dict[Engine, Path] = {}

    def result(name: str) -> dict[str, Any]:
        engine = CASES[name].engine
        if engine not in directories:
            directories[engine] = tmp_path_factory.mktemp("cases")
            run_engine(engine, directories[engine])
        return torch.load(directories[engine] / f"{name}.pt")

    return result


def run_engine(engine: Engine, out: Path) -> None:
    worker = ["tests/launch/invariance_worker.py", out, "--engine", engine]
    if engine == "accelerate":  # its own ZeRO-3 configuration, without --deepspeed
        settings = ["--config_file", "scripts/zero3.yaml", "--mixed_precision", "no", "--main_process_port", 0]
        result = run(["accelerate", "launch", *settings, *worker])
        assert result.returncode == 0, result.stdout[-4000:]
    else:
        run_on({"one process": 1, "zero3 on four": 4}.get(engine, 2), *worker)


def assert_same(result: dict, expected: dict) -> None:
    error = relative_error(result["gradient"], expected["gradient"])
    print(f"gradient {error:.1e}, loss {result['train']['loss'] / expected['train']['loss'] - 1:.1e}")
    assert error < 1e-5
    for kind, keys in {
        "train": ("loss", "ce_loss", "train/avg_p_correct", "token_accuracy", "grad_norm"),
        "eval": ("eval_loss", "eval_ce_loss", "eval_avg_p_correct", "eval_acc", "eval_perplexity"),
    }.items():
        for key in keys:
            assert result[kind][key] == pytest.approx(expected[kind][key], rel=1e-5), key


@pytest.mark.parametrize("name", ["row by row", "whole batch from logits"])
def test_micro_batches_and_logits_give_the_gradient_of_the_whole_batch(result_of, name):
    assert_same(result_of(name), result_of("whole batch"))


@pytest.mark.parametrize("cut", ["half a batch", "row by row"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_gradient_of_one(result_of, engine, cut):
    assert_same(result_of(f"{engine}, {cut}"), result_of("whole batch"))


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_other_kinds_have_the_gradient_of_one_process(result_of, head, engine):
    assert_same(result_of(f"{engine}, {head} head"), result_of(f"whole batch, {head} head"))


@pytest.mark.parametrize("name", ["ddp, padding-free", "zero2, padding-free", "zero3, packed", "fsdp, packed"])
def test_batches_without_padding_give_the_gradient_of_padded_ones(result_of, name):
    """The 8 rows are 3 packed ones, so that one process has a filler, which supervises nothing."""
    assert_same(result_of(name), result_of("whole batch"))


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("objective", ["idft", "prior"])
def test_objectives_have_the_gradient_of_one_process(result_of, objective, engine):
    """With entropies, and with log-probabilities by the starting weights, which the ranks have shared."""
    assert_same(result_of(f"{engine}, {objective}"), result_of(f"whole batch, {objective}"))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("whole batch, prior", "whole batch"),
        ("whole batch, prior, from logits", "whole batch"),
        ("row by row, prior", "whole batch"),
        ("zero3, prior, row by row", "whole batch"),
        ("fsdp, prior", "whole batch"),
        ("ddp, lora head, prior", "whole batch, lora head"),
    ],
)
def test_before_the_first_step_the_starting_weights_are_the_models(result_of, name, same):
    """So p_ref is p, and prior has the gradient of DFT: each token has got its own log-probability."""
    assert_same(result_of(name), result_of(same))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("ddp, sequence", "whole batch"),
        ("zero2, sequence", "whole batch"),
        ("zero3, sequence", "whole batch"),
        ("zero3 on four, one sequence", "whole batch"),
        ("zero3 on four, sequence", "whole batch, turn"),
        ("ddp, sequence, turn", "whole batch, turn"),
        ("ddp, sequence, idft", "whole batch, idft"),
        ("zero3, sequence, prior", "whole batch, prior"),
        ("zero3, lora head, sequence", "whole batch, lora head"),
    ],
)
def test_processes_that_share_a_batch_give_the_gradient_of_one(result_of, name, same):
    """Also where two groups of two train, and where the model's two key heads are divided over four processes."""
    assert_same(result_of(name), result_of(same))


def test_the_objectives_differ(result_of):
    assert relative_error(result_of("whole batch, idft")["gradient"], result_of("whole batch")["gradient"]) > 1e-2


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_offloaded_gradients_are_those_of_all_micro_batches(result_of, engine):
    """DeepSpeed before 0.19 kept only some of them."""
    assert_same(result_of(f"{engine}, offloaded"), result_of("whole batch"))


def test_a_static_graph_of_ddp_gives_the_same_gradient(result_of):
    """There DDP reduces gradients only if the backward pass goes through the model's outputs."""
    assert_same(result_of("ddp, static graph"), result_of("whole batch"))


@pytest.mark.parametrize("name", ["mutant, half a batch", "mutant, row by row"])
def test_the_check_rejects_a_mean_per_micro_batch(result_of, name):
    result, expected = result_of(name), result_of("whole batch")
    assert relative_error(result["gradient"], expected["gradient"]) > 1e-3
    with pytest.raises(AssertionError):
        assert_same(result, expected)


def test_training_without_averaged_gradients_is_refused(result_of):
    """Trainer.evaluate before Trainer.train leaves the model without DDP: each rank would train alone."""
    assert "gradients would not be averaged" in result_of("evaluated first")["error"]


def test_fsdp_shards_a_model_that_was_evaluated_first(result_of):
    assert_same(result_of("fsdp, evaluated first"), result_of("whole batch"))


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp"])
def test_an_infinite_gradient_of_one_process_ends_all_before_the_update(result_of, engine):
    result = result_of(f"{engine}, stop")
    assert [end.partition(" is ")[0] for end in result["ends"]] == ["the norm of the gradient"] * 2
    assert not result["gradient"].any()


@pytest.mark.parametrize("name", ["ddp, skip", "zero2, skip", "zero3, skip", "fsdp, skip", "zero3, offloaded, skip"])
def test_its_update_is_skipped_on_all_processes(result_of, name):
    result = result_of(name)
    assert result["ends"] == ["", ""]
    assert not result["gradient"].any()
    assert result["train"]["train/nonfinite_steps"] == 1
