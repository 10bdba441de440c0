"""The loss from hidden states against float64, written out token by token, and the mutants that must fail."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dft.loss import fused as fused_loss
from dft.loss.from_logits import TokenData, count_terms, dft_loss_sum, loss_weight_of_tokens, supervised_rows
from dft.loss.fused import LogitTransform, chunked_dft_loss_sum, fused_dft_loss_sum
from dft.loss.objectives import Dft
from dft.loss.statistics import Needs, entropy_of
from dft.loss.token_weight import TokenWeight
from tests.helpers import relative_error

V, H = 53, 8


@dataclass
class Case:
    """A loss and all that it depends on."""

    weight: TokenWeight = field(default_factory=lambda: TokenWeight(0.7))
    transform: LogitTransform = field(default_factory=LogitTransform)
    normalization: str = "token"
    is_weighted: bool = False
    chunk_rows: int = 3
    seed: int = 0

    def tensors(self):
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(3, 17, H, generator=generator)
        head = torch.randn(V, H, generator=generator)
        bias = torch.randn(V, generator=generator)
        labels = torch.randint(V, (3, 17), generator=generator)
        labels[torch.rand(3, 17, generator=generator) < 0.4] = -100
        loss_weights = 2 * torch.rand(3, 17, generator=generator) if self.is_weighted else None
        return hidden, head, bias, labels, loss_weights


def reference(case: Case) -> tuple[float, list[torch.Tensor]]:
    """The loss in float64 and its gradients with respect to hidden states, head and bias."""
    *inputs, labels, loss_weights = case.tensors()
    hidden, head, bias = (x.double().requires_grad_() for x in inputs)
    loss, w = torch.zeros((), dtype=torch.float64), case.weight
    for b, row in enumerate(labels.tolist()):
        turns: list[list[int]] = []  # positions of supervised tokens
        for t in range(1, len(row)):
            if row[t] != -100:
                turns.append([*turns.pop(), t] if turns and turns[-1][-1] == t - 1 else [t])
        for turn in turns:
            for t in turn:
                z = hidden[b, t - 1] @ head.T + bias
                z = z * case.transform.scale
                cap = case.transform.softcap
                z = z if cap is None else cap * torch.tanh(z / cap)
                nll = -torch.log_softmax(z, dim=-1)[row[t]]
                p = math.exp(-nll.item())
                factor = (
                    1.0 if row[t] in w.plain_tokens else max(w.floor, w.alpha * p**w.objective.gamma + 1 - w.alpha)
                )
                factor *= 1.0 if loss_weights is None else loss_weights[b, t].item()
                factor *= 1 / len(turn) if case.normalization == "turn" else 1.0
                loss = loss + factor * nll
    loss.backward()
    return loss.item(), [x.grad for x in (hidden, head, bias)]


class Head(torch.nn.Linear):
    """A linear layer that is not known to be one."""


def from_logits(hidden, head, bias, labels, weight, data, transform, chunk_mb):
    return dft_loss_sum(transform(hidden @ head.T + bias), labels, weight, data)


def fused(hidden, head, bias, labels, weight, data, transform, chunk_mb):
    return fused_dft_loss_sum(hidden, head, labels, weight, data, bias=bias, transform=transform, chunk_mb=chunk_mb)


def chunked(hidden, head, bias, labels, weight, data, transform, chunk_mb):
    module = Head(H, V)
    del module.weight, module.bias
    module.weight, module.bias = head, bias
    return chunked_dft_loss_sum(
        hidden, module, labels, weight, data, transform=transform, chunk_mb=chunk_mb, vocab_size=V
    )


def check(loss_sum, case: Case) -> None:
    """Asserts that a loss and its gradients equal the reference up to rounding.

    On one processor, other orders of the same sums change the loss by up to 2e-7 relative, and the gradients by 4e-7.
    """
    *inputs, labels, loss_weights = case.tensors()
    hidden, head, bias = (x.requires_grad_() for x in inputs)
    data = TokenData(loss_weight_of_tokens(labels, loss_weights, case.normalization))
    chunk_mb = case.chunk_rows * 4 * V / 1e6
    loss, tokens = loss_sum(hidden, head, bias, labels, case.weight, data, case.transform, chunk_mb)
    (loss / 7).backward()
    expected, gradients = reference(case)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for x, gradient in zip((hidden, head, bias), gradients, strict=True):
        assert relative_error(7 * x.grad.double(), gradient) < 3e-6
    assert tokens.nll.shape == tokens.is_top1.shape == ((labels[:, 1:] != -100).sum(),)


CASES = {
    "SFT": Case(TokenWeight(0.0)),
    "alpha 0.7": Case(),
    "DFT": Case(TokenWeight(1.0)),
    "gamma": Case(TokenWeight(0.9, objective=Dft(0.5))),
    "floor": Case(TokenWeight(1.0, floor=0.1)),
    "plain tokens": Case(TokenWeight(1.0, plain_tokens=tuple(range(20)))),
    "scale": Case(transform=LogitTransform(0.125)),
    "softcap": Case(transform=LogitTransform(1.0, 3.0)),
    "scale and softcap": Case(transform=LogitTransform(0.5, 2.0)),
    "weights": Case(is_weighted=True),
    "turns": Case(normalization="turn"),
    "weights and turns": Case(is_weighted=True, normalization="turn", seed=1),
    "one row at a time": Case(chunk_rows=1),
    "all at once": Case(chunk_rows=100, seed=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss_sum", [from_logits, fused, chunked])
def test_value_and_gradients_equal_float64(loss_sum, name):
    check(loss_sum, CASES[name])


def no_slope(monkeypatch):
    monkeypatch.setattr(LogitTransform, "slope", lambda self, z: 1.0)


def no_weight_in_the_head(monkeypatch):
    product, rows = fused_loss._product, []
    monkeypatch.setattr(fused_loss, "_product", lambda a, b, out=None: rows.append(a) or product(a, b, out))
    # the hidden states of the chunk, without c * w: what the last but one product began with
    monkeypatch.setattr(fused_loss, "_add_product", lambda total, a, b: total.addmm_(a, rows[-2]))


def weight_of_another_token(monkeypatch):
    call = TokenWeight.__call__
    monkeypatch.setattr(TokenWeight, "__call__", lambda self, tokens: call(self, tokens).roll(1))


def no_onehot(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda self, *args: self)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (no_slope, "softcap"),
        (no_slope, "scale"),
        (no_weight_in_the_head, "alpha 0.7"),
        (weight_of_another_token, "alpha 0.7"),
        (weight_of_another_token, "plain tokens"),
        (no_onehot, "SFT"),
    ],
)
def test_the_reference_rejects_mutants(mutant, name, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check(fused, CASES[name])


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that is made, those of the shapes in `known` not counted."""

    def __init__(self, *known: tuple[int, ...]):
        super().__init__()
        self.known, self.most = known, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and tuple(x.shape) not in self.known:
                self.most = max(self.most, x.numel())
        return result


@pytest.mark.parametrize("length", [50, 400])
def test_no_more_than_a_chunk_of_logits_is_held(length):
    vocab, rows = 997, 5
    hidden = torch.randn(1, length, H, requires_grad=True)
    head = torch.randn(vocab, H, requires_grad=True)
    labels = torch.randint(vocab, (1, length))
    with LargestTensor((vocab, H), (H, vocab)) as seen:
        loss, _ = fused_dft_loss_sum(hidden, head, labels, TokenWeight(), chunk_mb=rows * 4 * vocab / 1e6)
        loss.backward()
    assert seen.most == rows * vocab
    with LargestTensor((vocab, H), (H, vocab)) as seen:
        from_logits(hidden, head, 0.0, labels, TokenWeight(), TokenData(), LogitTransform(), 0)[0].backward()
    assert seen.most >= (length - 1) * vocab


def test_a_frozen_head_costs_no_gradient():
    hidden, head, bias, labels, _ = Case().tensors()
    hidden.requires_grad_()
    with LargestTensor() as seen:
        loss, _ = fused_dft_loss_sum(hidden, head, labels, TokenWeight(), chunk_mb=4 * V / 1e6)
        loss.backward()
    assert torch.count_nonzero(hidden.grad) > 0
    assert seen.most < head.numel() + hidden.numel()  # no second head


def test_without_gradients_the_statistics_are_the_same():
    hidden, head, bias, labels, _ = Case().tensors()
    with_gradient, tokens = fused_dft_loss_sum(hidden.requires_grad_(), head, labels, TokenWeight(), bias=bias)
    with torch.no_grad():
        loss, same = fused_dft_loss_sum(hidden, head, labels, TokenWeight(), bias=bias)
        other, _ = fused_dft_loss_sum(hidden.roll(1), head, labels, TokenWeight(), bias=bias)
    torch.testing.assert_close(loss, with_gradient.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(same.nll, tokens.nll, rtol=1e-5, atol=1e-5)
    assert same.is_top1.tolist() == tokens.is_top1.tolist()
    assert relative_error(other, loss) > 1e-3


@pytest.mark.parametrize("loss_sum", [fused, chunked])
def test_nothing_supervised_is_a_connected_zero(loss_sum):
    hidden, head, bias, labels, _ = Case().tensors()
    inputs = [x.requires_grad_() for x in (hidden, head, bias)]
    nothing = torch.full_like(labels, -100)
    loss, tokens = loss_sum(*inputs, nothing, TokenWeight(), TokenData(), LogitTransform(), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert tokens.nll.numel() == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in inputs)


def test_a_second_backward_pass_is_refused():
    hidden, head, _, labels, _ = Case().tensors()
    loss, _ = fused_dft_loss_sum(hidden.requires_grad_(), head, labels, TokenWeight())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_err_by_the_rounding_of_their_results(autocast):
    """Inputs of 16 bits are exact numbers; the sums over them are float32, the gradients rounded once."""
    hidden, head, _, labels, _ = Case().tensors()
    hidden, head = hidden.bfloat16(), head.bfloat16()
    inputs = [(x.float() if autocast else x.clone()).requires_grad_() for x in (hidden, head)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, tokens = fused_dft_loss_sum(*inputs, labels, TokenWeight(0.7), chunk_mb=3 * 4 * V / 1e6)
    loss.backward()
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    expected, of_tokens = from_logits(*exact, 0.0, labels, TokenWeight(0.7), TokenData(), LogitTransform(), 0)
    expected.backward()
    assert tokens.p_correct.dtype == torch.float32
    torch.testing.assert_close(tokens.nll.double(), of_tokens.nll.double(), rtol=1e-5, atol=1e-5)
    for x, y in zip(inputs, exact, strict=True):
        assert x.grad.dtype == x.dtype
        assert relative_error(x.grad.double(), y.grad) < (1e-5 if autocast else 2**-8)


def test_turns_are_counted_as_unbroken_runs():
    labels = torch.tensor([[7, 7, -100, 7, 7, 7], [-100, 7, 7, 7, 7, 7], [7, -100, -100, -100, -100, -100]])
    assert count_terms(labels, "turn") == 3
    assert count_terms(labels, "token") == 9
    scales = loss_weight_of_tokens(labels, None, "turn")
    assert scales.tolist() == pytest.approx([1, *[1 / 3] * 3, *[1 / 5] * 5])
    assert loss_weight_of_tokens(labels) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"floor": 1.1}, "floor"),
    ],
)
def test_weights_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenWeight(**settings)


def entropies(logits: torch.Tensor) -> torch.Tensor:
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("has_gradient", [True, False])
@pytest.mark.parametrize("loss_sum", [from_logits, fused, chunked])
def test_entropy_equals_float64_and_leaves_the_loss_as_it_is(loss_sum, has_gradient):
    """Of the logits after their transform, against float64; the loss stays what it is without it."""
    case = Case(transform=LogitTransform(0.5, softcap=3.0))
    hidden, head, bias, labels, _ = case.tensors()
    args = (labels, case.weight, TokenData())
    plain_logits = hidden.double() @ head.double().T + bias.double()
    logits = case.transform(plain_logits)
    expected, before_transform = (entropies(supervised_rows(z, labels)[0]) for z in (logits, plain_logits))
    own = {"transform": case.transform, "chunk_mb": 3 * 4 * V / 1e6, "needs": Needs(entropy=True)}
    module = Head(H, V)
    with torch.no_grad():
        module.weight.copy_(head)
        module.bias.copy_(bias)
    with torch.set_grad_enabled(has_gradient):
        if loss_sum is from_logits:
            loss, tokens = dft_loss_sum(logits.float(), *args, needs=own["needs"])
        elif loss_sum is fused:
            loss, tokens = fused_dft_loss_sum(hidden.requires_grad_(), head, *args, bias=bias, **own)
        else:
            loss, tokens = chunked_dft_loss_sum(hidden, module, *args, vocab_size=V, **own)
    torch.testing.assert_close(tokens.entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert relative_error(tokens.entropy.double(), before_transform) > 1e-2
    assert not tokens.entropy.requires_grad
    plain, without = dft_loss_sum(logits.float(), *args)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert without.entropy is None


def test_words_that_are_ruled_out_add_no_entropy():
    """A model that masks words gives them logits of minus infinity: they add nothing."""
    logits = torch.tensor([[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf]])
    assert entropy_of(torch.softmax(logits, dim=-1)).tolist() == pytest.approx([math.log(2), 0.0])
