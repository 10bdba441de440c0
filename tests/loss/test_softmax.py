"""The pass over the logits in both ways, in place and by the kernel, against float64."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from dft.loss import softmax
from dft.loss.statistics import Needs
from tests.helpers import relative_error

NEEDS = Needs(entropy=True, concentration=True, top_k=5)


@pytest.fixture(params=["in place", "kernel"])
def softmax_gradient(request):
    """As softmax.softmax_gradient_, in one of the ways. On a processor the kernel is interpreted."""
    if request.param == "in place":
        return softmax.softmax_gradient_
    pytest.importorskip("triton", reason="triton is not installed")
    return softmax._by_kernel


def logits(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of six rows, among them difficult ones, and targets."""
    z = 5 * torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0))
    z[1, 3] = 200.0  # all others underflow
    z[2] -= 1000.0
    z[3, 7:] = -math.inf
    z[4] = 7.0  # all alike
    z[5].copy_(z[5].sort().values)  # the greatest logit changes all the time
    return z, torch.tensor([0, 4, vocab_size - 1, 5, vocab_size // 2, 6])


def check(softmax_gradient, vocab_size: int, dtype: torch.dtype | None) -> None:
    """Asserts that statistics and the gradient in this type are those of float64, up to rounding."""
    z, targets = logits(vocab_size)
    p, index = torch.softmax(z.double(), -1), targets[:, None]
    log_p = torch.log_softmax(z.double(), -1)
    likeliest = torch.softmax(z.double().topk(5).values, -1)
    overwritten = z.clone()
    out = None
    if dtype is not None:
        out = overwritten if dtype == torch.float32 else torch.full_like(z, math.nan, dtype=dtype)
    tokens = softmax_gradient(overwritten, targets, out, NEEDS)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(tokens.nll.double(), -log_p.gather(1, index).squeeze(1), **close)
    torch.testing.assert_close(tokens.p_correct.double(), p.gather(1, index).squeeze(1), **close)
    torch.testing.assert_close(tokens.entropy.double(), torch.special.entr(p).sum(-1), **close)
    torch.testing.assert_close(tokens.concentration.double(), p.square().sum(-1), **close)
    torch.testing.assert_close(tokens.top_entropy.double(), torch.special.entr(likeliest).sum(-1), **close)
    assert tokens.is_top1.tolist() == (z.gather(1, index).squeeze(1) >= z.amax(-1)).tolist()
    if out is not None:
        assert out.dtype == dtype
        expected = p - one_hot(targets, vocab_size)
        assert relative_error(out.double(), expected) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("vocab_size", [1000, 8192, 9001])  # less than a block of the kernel, two blocks, and more
def test_statistics_and_gradient_equal_float64(softmax_gradient, vocab_size, dtype):
    check(softmax_gradient, vocab_size, dtype)


@pytest.mark.parametrize("mutant", ["no onehot", "columns moved", "half a row"])
def test_the_comparison_rejects_mutants(softmax_gradient, mutant):
    def mutated(z, targets, out, needs):
        tokens = softmax_gradient(z, targets, out, needs)
        if mutant == "no onehot":
            out.scatter_add_(1, targets[:, None], torch.ones_like(out[:, :1]))
        elif mutant == "columns moved":
            out.copy_(out.roll(1, dims=1))
        else:
            out[:, out.shape[1] // 2 :] = 0
        return tokens

    with pytest.raises(AssertionError):
        check(mutated, 1000, torch.float32)


def test_nan_is_seen(softmax_gradient):
    """A model that says NaN must not look healthy."""
    z, targets = logits(1000)
    z[1, 500] = math.nan
    tokens = softmax_gradient(z.clone(), targets, torch.empty_like(z, dtype=torch.bfloat16), NEEDS)
    assert [math.isnan(x) for x in tokens.nll] == [False, True, False, False, False, False]
    assert math.isnan(tokens.entropy[1])


def test_no_rows_are_fine(softmax_gradient):
    z = torch.empty(0, 1000)
    tokens = softmax_gradient(z, torch.empty(0, dtype=torch.int64), torch.empty_like(z), NEEDS)
    assert [len(x) for x in (tokens.nll, tokens.entropy, tokens.concentration, tokens.is_top1)] == [0] * 4
