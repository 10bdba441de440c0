"""The loss against float64 references on random logits, values and gradients, and the mutants that must fail."""

import math

import pytest
import torch

from dft.loss.from_logits import TokenData, count_terms, dft_loss_sum, loss_weight_of_tokens, shift_labels
from dft.loss.statistics import token_statistics
from dft.loss.token_weight import TokenWeight
from tests.helpers import relative_error


def random_case(seed: int = 0, batch: int = 3, length: int = 17, vocab: int = 29):
    """Logits [B, T, V] in float32 and labels [B, T] of which about half are supervised."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, length, vocab, generator=generator)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.5] = -100
    return logits, labels


def reference(logits: torch.Tensor, labels: torch.Tensor, alpha: float) -> tuple[float, torch.Tensor]:
    """Loss sum and its gradient with respect to the logits in float64, written out token by token.

    d(w * nll)/dz = w * (softmax(z) - onehot), since w is a constant of the gradient.
    """
    logits = logits.double()
    loss, gradient = 0.0, torch.zeros_like(logits)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            target = int(labels[b, t + 1])
            if target == -100:
                continue
            probabilities = torch.softmax(logits[b, t], dim=-1)
            p = float(probabilities[target])
            weight = alpha * p + 1 - alpha
            loss += weight * -math.log(p)
            gradient[b, t] = weight * probabilities
            gradient[b, t, target] -= weight
    return loss, gradient


def check_against_reference(loss_sum, alpha: float, seed: int = 0) -> None:
    """Asserts that `loss_sum(logits, labels, alpha)` and its gradient equal the reference up to rounding.

    On one processor, other orders of the same sums change the loss by up to 2e-7 relative, and the gradient by 5e-7.
    """
    logits, labels = random_case(seed)
    logits.requires_grad_()
    loss = loss_sum(logits, labels, alpha)
    loss.backward()
    expected_loss, expected_gradient = reference(logits.detach(), labels, alpha)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert relative_error(logits.grad.double(), expected_gradient) < 3e-6


def ours(logits, labels, alpha):
    return dft_loss_sum(logits, labels, TokenWeight(alpha))[0]


def statistics(logits, labels):
    targets = shift_labels(labels)
    return token_statistics(logits[targets != -100], targets[targets != -100])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_value_and_gradient_equal_float64_reference(alpha, seed):
    check_against_reference(ours, alpha, seed)


def no_detach(logits, labels, alpha):
    tokens = statistics(logits, labels)
    return ((alpha * torch.exp(-tokens.nll) + 1 - alpha) * tokens.nll).sum()


def wrong_token(logits, labels, alpha):
    tokens = statistics(logits, labels)
    other = statistics(logits, torch.where(labels == -100, labels, (labels + 1) % logits.shape[-1]))
    return (TokenWeight(alpha)(other) * tokens.nll).sum()


def off_by_one(logits, labels, alpha):
    """Scores position t against token t instead of t + 1."""
    return ours(logits, torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-100), alpha)


def mean_over_tokens(logits, labels, alpha):
    return ours(logits, labels, alpha) / count_terms(labels)


@pytest.mark.parametrize("mutant", [no_detach, wrong_token, off_by_one, mean_over_tokens])
def test_the_reference_rejects_mutants(mutant):
    with pytest.raises(AssertionError):
        check_against_reference(mutant, alpha=0.7)


def test_alpha_0_equals_cross_entropy():
    logits, labels = random_case()
    ours_in, theirs_in = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = ours(ours_in, labels, 0.0)
    expected = torch.nn.functional.cross_entropy(
        theirs_in[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert relative_error(ours_in.grad, theirs_in.grad) < 3e-6
    almost = logits.clone().requires_grad_()
    ours(almost, labels, 0.01).backward()
    assert relative_error(almost.grad, theirs_in.grad) > 1e-3


def test_gradient_at_p_one_tenth():
    """p = 0.1 and alpha = 1: the gradient of the target logit is p * (p - 1) = -0.09, and +0.1172 undetached."""
    logits = torch.log(torch.tensor([0.1, 0.9])).reshape(1, 1, 2).repeat(1, 2, 1)
    labels = torch.tensor([[-100, 0]])
    for loss_sum, expected in ((ours, -0.09), (no_detach, 0.1172)):
        x = logits.clone().requires_grad_()
        loss_sum(x, labels, 1.0).backward()
        assert x.grad[0, 0, 0].item() == pytest.approx(expected, abs=5e-5)


def test_statistics_of_the_tokens_equal_float64():
    logits, labels = random_case()
    tokens = statistics(logits.bfloat16(), labels)
    targets = labels[:, 1:]
    supervised = targets != -100
    probabilities = torch.softmax(logits.bfloat16().double()[:, :-1], dim=-1)[supervised]
    expected = probabilities.gather(1, targets[supervised][:, None]).squeeze(1)
    assert tokens.p_correct.dtype == torch.float32
    torch.testing.assert_close(tokens.p_correct.double(), expected, rtol=1e-5, atol=1e-8)
    assert tokens.is_top1.tolist() == (probabilities.argmax(1) == targets[supervised]).tolist()


def weights_of_the_position_before(logits, labels, alpha, weights):
    """The mutant: the weight of the token that predicts, not of the token that is predicted."""
    scales = loss_weight_of_tokens(labels, torch.roll(weights, 1, dims=-1))
    return dft_loss_sum(logits, labels, TokenWeight(alpha), TokenData(scales))[0]


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_loss_weights_multiply_the_loss_of_their_token(alpha):
    logits, labels = random_case()
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    expected = 0.0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            alone = torch.full_like(labels, -100)
            alone[b, t] = labels[b, t]
            expected += float(weights[b, t]) * reference(logits, alone, alpha)[0]
    found, _ = dft_loss_sum(logits, labels, TokenWeight(alpha), TokenData(loss_weight_of_tokens(labels, weights)))
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(weights_of_the_position_before(logits, labels, alpha, weights)) != pytest.approx(expected, rel=1e-3)


def test_nothing_supervised_is_a_connected_zero():
    logits, labels = random_case()
    logits[0, 0, 0] = float("inf")  # an unsupervised row must not poison the sum
    logits.requires_grad_()
    loss = ours(logits, torch.full_like(labels, -100), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(logits.grad) == 0


def test_the_first_token_of_a_row_is_never_counted():
    labels = torch.tensor([[5, -100, 7], [5, 6, -100]])
    assert count_terms(labels) == 2
