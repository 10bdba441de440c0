"""The loss, its gradient and the evaluation don't depend on how the batch is cut into ranks and micro-batches."""

import pytest
import torch

from tests.helpers import run

pytestmark = pytest.mark.launch


def one_step(out, mode: str, processes: int, *cuts: str, expect: int = 0) -> tuple[dict[str, dict], str]:
    """What invariance_worker.py finds for every cut, and its output."""
    if mode == "accelerate":  # its own ZeRO-3 configuration, without --deepspeed
        launcher = ["accelerate", "launch", "--config_file", "scripts/zero3.yaml", "--mixed_precision", "no"]
    else:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", processes] if processes > 1 else ["python"]
    result = run([*launcher, "tests/launch/invariance_worker.py", out, mode, *cuts])
    assert (result.returncode != 0) == (expect != 0), result.stdout[-4000:]
    return {cut: torch.load(out / f"{cut}.pt") for cut in cuts if not expect}, result.stdout


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, the whole batch at once."""
    return one_step(tmp_path_factory.mktemp("one"), "ddp", 1, "8x1", "1x8")[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same(result: dict, expected: dict) -> None:
    error = relative(result["gradient"], expected["gradient"])
    print(f"gradient {error:.1e}, loss {result['train']['loss'] / expected['train']['loss'] - 1:.1e}")
    assert error < 1e-5
    for kind, keys in {
        "train": ("loss", "ce_loss", "train/avg_p_correct", "token_accuracy", "grad_norm"),
        "eval": ("eval_loss", "eval_ce_loss", "eval_avg_p_correct", "eval_acc", "eval_perplexity"),
    }.items():
        for key in keys:
            assert result[kind][key] == pytest.approx(expected[kind][key], rel=1e-5), key


def test_accumulation(reference):
    assert_same(reference["1x8"], reference["8x1"])


@pytest.mark.parametrize("cut", ["4x1", "1x4"])
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "accelerate"])
def test_ranks_and_accumulation(reference, tmp_path, mode, cut):
    results, _ = one_step(tmp_path, mode, 2, cut)
    assert_same(results[cut], reference["8x1"])


def test_the_loss_from_logits_is_the_same(reference, tmp_path):
    results, _ = one_step(tmp_path, "ddp-logits", 1, "8x1")
    assert_same(reference["8x1"], results["8x1"])


@pytest.mark.parametrize("head", ["untied", "lora", "frozen"])
def test_heads_of_other_kinds(tmp_path, head):
    alone, _ = one_step(tmp_path / "one", f"ddp-{head}", 1, "8x1")
    for mode in ("ddp", "zero3"):
        results, _ = one_step(tmp_path / mode, f"{mode}-{head}", 2, "1x4")
        assert_same(results["1x4"], alone["8x1"])


@pytest.mark.parametrize(("mode", "cut"), [("ddp-flat", "2x2"), ("zero2-flat", "4x1"), ("zero3-packed", "2x1")])
def test_batches_without_padding(reference, tmp_path, mode, cut):
    """The 8 rows, which are 4 packed ones: none on one rank alone, and a filler where there are less."""
    results, _ = one_step(tmp_path, mode, 2, cut)
    assert_same(results[cut], reference["8x1"])


def test_ddp_with_a_static_graph(reference, tmp_path):
    """It reduces gradients only where a backward pass goes through the model's outputs."""
    results, _ = one_step(tmp_path, "static", 2, "4x1")
    assert_same(results["4x1"], reference["8x1"])


def test_fsdp():
    result = run(["torchrun", "--standalone", "--nproc-per-node", 2, "tests/launch/fsdp_worker.py"])
    assert result.returncode == 0, result.stdout[-3000:]
    assert result.stdout.count("resharded") == 4  # two kinds, two ranks


def test_the_check_rejects_a_mean_per_micro_batch(reference, tmp_path):
    results, _ = one_step(tmp_path, "mutant", 2, "4x1", "1x4")
    for result in results.values():
        with pytest.raises(AssertionError):
            assert_same(result, reference["8x1"])


def test_training_without_averaged_gradients_is_refused(tmp_path):
    """Trainer.evaluate before Trainer.train leaves the model without DDP: each rank would train alone."""
    _, output = one_step(tmp_path, "evaluated", 2, "4x1", expect=1)
    assert "gradients would not be averaged" in output
