"""Every objective against a float64 reference, written out token by token from the published formulas."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from dft.config.loss import LossConfig
from dft.config.objectives import OBJECTIVES
from dft.loss import objectives, softmax
from dft.loss.from_logits import TokenData, dft_loss_sum
from dft.loss.fused import chunked_dft_loss_sum, fused_dft_loss_sum
from dft.loss.objectives import make_objective
from dft.loss.statistics import Needs, TokenStatistics
from dft.loss.token_weight import TokenWeight
from tests.helpers import relative_error

V, H, N = 53, 8, 24
Formula = dict[str, float]


# ---- the reference: the weight of one token, from its probabilities, the correct token and the reference's log p ----


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def dft(p, y, ref, gamma=1.0):
    return p[y] ** gamma


def sft(p, y, ref):
    return 1.0


def threshold(p, y, ref, tau, power):
    return p[y] ** power if p[y] >= tau else 0.0


def eaft(p, y, ref, exponent, top_k, scale):
    likeliest = sorted(p, reverse=True)[:top_k]
    total = sum(likeliest)
    return (entropy([x / total for x in likeliest]) / scale) ** exponent


def deft(p, y, ref):
    return p[y] ** sum(x * x for x in p)


def idft(p, y, ref, temperature, low, high):
    power = math.exp(-(math.log(p[y]) + entropy(p)) / temperature)
    return p[y] ** min(max(power, low), high)


def talr(p, y, ref, tau, least):
    return max(p[y] ** (1 / tau), least)


def chord(p, y, ref):
    return p[y] * (1 - p[y])


def prior(p, y, ref):
    return math.exp(ref)


def anchored(p, y, ref, strength, max_ratio):
    return p[y] + strength * (min(math.exp(ref) / p[y], max_ratio) - 1)


def importance(p, y, ref, low, high):
    return min(max(p[y] / math.exp(ref), low), high)


FORMULAS = [dft, sft, threshold, eaft, deft, idft, talr, chord, prior, anchored, importance]
CASES = {
    **{formula.__name__: (formula.__name__, {}) for formula in FORMULAS},
    "threshold with p": ("threshold", {"tau": 0.3, "power": 1.0}),
    "eaft of 5 tokens": ("eaft", {"top_k": 5, "exponent": 2.0, "scale": 1.6}),
    "eaft of more tokens than there are": ("eaft", {"top_k": 1000}),
    "idft at another temperature": ("idft", {"temperature": 0.5, "low": 0.3, "high": 1.5}),
    "talr": ("talr", {"tau": 0.4, "least": 0.05}),
    "strongly anchored": ("anchored", {"strength": 0.5, "max_ratio": 2.0}),
    "importance, narrow": ("importance", {"low": 0.5, "high": 1.2}),
}


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [1, N, H], head [V, H], labels [1, N], and log p by the starting weights [N - 1]."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=generator)
    labels = torch.randint(V, (1, N), generator=generator)
    hidden = torch.randn(1, N, H, generator=generator)
    hidden[0, :-1:2] += head[labels[0, 1::2]]  # of every second token the model is rather sure
    reference_log_p = -3 * torch.rand(N - 1, generator=generator)
    return hidden, head, labels, reference_log_p


def weights_by_formula(formula, logits: torch.Tensor, labels: torch.Tensor, reference_log_p: torch.Tensor):
    probabilities = torch.softmax(logits[0, :-1].double(), dim=-1).tolist()
    targets = labels[0, 1:].tolist()
    return [formula(p, y, ref) for p, y, ref in zip(probabilities, targets, reference_log_p.tolist(), strict=True)]


def expected(formula) -> tuple[float, list[torch.Tensor], torch.Tensor]:
    """Loss, gradients of hidden states and head, and weights, in float64."""
    *inputs, labels, reference_log_p = problem()
    hidden, head = (x.double().requires_grad_() for x in inputs)
    logits = hidden @ head.T
    weights = weights_by_formula(formula, logits.detach(), labels, reference_log_p)
    loss = torch.zeros((), dtype=torch.float64)
    for t, weight in enumerate(weights):
        loss = loss - weight * torch.log_softmax(logits[0, t], dim=-1)[labels[0, t + 1]]
    loss.backward()
    return loss.item(), [hidden.grad, head.grad], torch.tensor(weights)


def from_logits(hidden, head, labels, weight, data):
    return dft_loss_sum(hidden @ head.T, labels, weight, data)


def fused(hidden, head, labels, weight, data):
    return fused_dft_loss_sum(hidden, head, labels, weight, data, chunk_mb=5 * 4 * V / 1e6)


def fused_by_kernel(hidden, head, labels, weight, data):
    """With the kernel that GPUs take."""
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("dft.loss.fused.softmax_gradient_", softmax._by_kernel)
        return fused(hidden, head, labels, weight, data)


def chunked(hidden, head, labels, weight, data):
    def module(rows):
        return rows @ head.T

    return chunked_dft_loss_sum(hidden, module, labels, weight, data, chunk_mb=5 * 4 * V / 1e6, vocab_size=V)


def check(loss_sum, weight: TokenWeight, formula) -> None:
    """Asserts that loss, gradients and weights are those of the formula, up to rounding."""
    *inputs, labels, reference_log_p = problem()
    hidden, head = (x.requires_grad_() for x in inputs)
    data = TokenData(reference_log_p=reference_log_p)
    loss, tokens = loss_sum(hidden, head, labels, weight, data)
    loss.backward()
    expected_loss, gradients, weights = expected(formula)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    for x, gradient in zip((hidden, head), gradients, strict=True):
        assert relative_error(x.grad.double(), gradient) < 1e-5
    assert relative_error(tokens.weight.double(), weights.double()) < 1e-5
    assert not tokens.weight.requires_grad


def configured(case: str) -> tuple[TokenWeight, partial]:
    """The weight as the configuration makes it, and the formula with the same parameters."""
    name, arguments = CASES[case]
    config = LossConfig(objective=name, objective_args=arguments)
    formula = partial({f.__name__: f for f in FORMULAS}[name], **config.objective_arguments)
    return TokenWeight(objective=make_objective(config)), formula


@pytest.mark.parametrize("loss_sum", [from_logits, fused, fused_by_kernel, chunked])
@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_weight_equal_float64(case, loss_sum):
    check(loss_sum, *configured(case))


def test_the_reference_knows_every_objective():
    assert [formula.__name__ for formula in FORMULAS] == list(OBJECTIVES)
    tried = {name for name, arguments in CASES.values() if arguments}
    assert tried == {name for name, about in OBJECTIVES.items() if about.parameters}


# ---- mutants --------------------------------------------------------------------------------------------------------


MUTANTS = {
    "dft": lambda t: t.p_correct**2,
    "sft": lambda t: t.p_correct,
    "threshold": lambda t: torch.where(t.p_correct < 0.1, 1.0, 0.0),
    "eaft": lambda t: t.top_entropy,  # axolotl's, without the scale
    "deft": lambda t: t.p_correct ** t.concentration.sqrt(),
    "idft": lambda t: t.p_correct ** torch.exp(t.nll - t.entropy).clamp(min=0.1),  # without the greatest exponent
    "talr": lambda t: t.p_correct,  # without the least weight
    "chord": lambda t: t.p_correct * (1 + t.p_correct),
    "prior": lambda t: torch.exp(t.reference_log_p.roll(1)),  # of another token
    "anchored": lambda t: t.p_correct + 0.01 * (torch.exp(-t.nll - t.reference_log_p).clamp(max=10) - 1),  # p / p_ref
    "importance": lambda t: torch.exp(-t.nll - t.reference_log_p),  # not clipped
}


class Mutant:
    """A weight that needs what the right one needs."""

    def __init__(self, right, weigh):
        self.needs, self._weigh = right.needs | Needs(entropy=True), weigh

    def __call__(self, tokens: TokenStatistics) -> torch.Tensor:
        return self._weigh(tokens)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reference_rejects_mutants(name):
    weight, formula = configured(name)
    same = replace(weight, objective=Mutant(weight.objective, weight.objective))
    check(fused, same, formula)
    with pytest.raises(AssertionError):
        check(fused, replace(weight, objective=Mutant(weight.objective, MUTANTS[name])), formula)


def without_detaching(tokens: TokenStatistics) -> torch.Tensor:
    """chord as a function that gradients flow through."""
    p = torch.exp(-tokens.nll)
    return p * (1 - p)


def test_no_gradient_flows_through_a_weight(monkeypatch):
    weight, formula = configured("chord")
    check(from_logits, replace(weight, objective=without_detaching), formula)  # cut off by TokenWeight
    monkeypatch.setattr(TokenWeight, "__call__", lambda self, tokens: self.objective(tokens))
    with pytest.raises(AssertionError):
        check(from_logits, replace(weight, objective=without_detaching), formula)


# ---- mixing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_alpha_floor_and_plain_tokens_work_for_every_objective(name):
    """But for the floor of anchored, which is refused on the command line."""
    weight, formula = configured(name)
    labels = problem()[2]
    plain = tuple(labels[0, 1:6].tolist())
    floor = 0.0 if name == "anchored" else 0.35

    def mixed(p, y, ref):
        return 1.0 if y in plain else max(0.7 * formula(p, y, ref) + 0.3, floor or -math.inf)

    check(fused, replace(weight, alpha=0.7, floor=floor, plain_tokens=plain), mixed)
    with pytest.raises(AssertionError):
        check(fused, replace(weight, alpha=0.7, floor=floor), lambda p, y, ref: 2 * mixed(p, y, ref))


def test_without_a_floor_weights_may_be_negative():
    strong = TokenWeight(objective=objectives.Anchored(2.0, 10.0))
    check(fused, strong, partial(anchored, strength=2.0, max_ratio=10.0))
    assert min(expected(partial(anchored, strength=2.0, max_ratio=10.0))[2]) < -0.5
    with pytest.raises(AssertionError):
        check(fused, replace(strong, floor=1e-9), partial(anchored, strength=2.0, max_ratio=10.0))


def test_any_function_of_the_statistics_is_a_weight():
    check(fused, TokenWeight(objective=lambda tokens: tokens.is_top1.float()), lambda p, y, ref: p[y] == max(p))


@pytest.mark.parametrize(
    ("weigh", "message"),
    [
        (lambda tokens: tokens.p_correct.mean(), "a weight for each of 5 tokens; it gave shape \\[\\]"),
        (lambda tokens: tokens.p_correct[:, None], "it gave shape \\[5, 1\\]"),
        (lambda tokens: 0.5, "it gave a float"),
    ],
)
def test_what_is_no_weight_is_refused(weigh, message):
    hidden, head, labels, _ = problem()
    with pytest.raises(ValueError, match=message):
        fused(hidden, head, labels, TokenWeight(objective=weigh), TokenData())


def test_rows_without_the_column_are_refused():
    hidden, head, labels, _ = problem()
    with pytest.raises(ValueError, match="rows have no column reference_log_p"):
        fused(hidden, head, labels, TokenWeight(objective=objectives.Prior()), TokenData())


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_computed():
    hidden, head, labels, _ = problem()
    weight = TokenWeight()
    for needs in (Needs(), Needs(entropy=True)):
        for loss_sum in (fused_dft_loss_sum, dft_loss_sum):
            args = (hidden, head) if loss_sum is fused_dft_loss_sum else (hidden @ head.T,)
            tokens = loss_sum(*args, labels, weight, needs=needs)[1]
            assert (tokens.entropy is not None) == needs.entropy
            assert tokens.concentration is None
            assert tokens.top_entropy is None


def test_needs_are_joined():
    assert Needs(entropy=True) | Needs(top_k=20) == Needs(entropy=True, top_k=20)
    assert Needs(top_k=5, reference=True) | Needs(concentration=True) == Needs(False, True, 5, True)


def test_clipped_ratios_are_found():
    tokens = TokenStatistics(torch.zeros(3, dtype=torch.int64), nll=torch.tensor([2.0, 1.0, 0.5]), p_correct=None,
                             is_top1=None, reference_log_p=torch.tensor([-0.5, -1.0, -3.0]))  # fmt: skip
    assert objectives.Anchored(0.1, 4.0).is_clipped(tokens).tolist() == [True, False, False]  # e**1.5, 1, e**-2.5
    assert objectives.Importance(0.5, 2.0).is_clipped(tokens).tolist() == [True, False, True]
