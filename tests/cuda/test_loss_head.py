"""The loss head on a GPU against float64, and the mutants that the comparison must tell from it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dft.loss import fused, softmax
from dft.loss.fused import chunked_dft_loss_sum, fused_dft_loss_sum
from dft.loss.head import LossHead
from dft.loss.statistics import Needs
from dft.loss.token_weight import TokenWeight
from examples.make_tiny_model import make_model
from tests.cuda.precision import MUTANTS, PRECISIONS, Precision, Reference, reference, tolerance
from tests.helpers import relative_error

pytestmark = pytest.mark.cuda

ALPHA = 0.7


@dataclass
class Problem:
    """Random hidden states, head and labels, whose tokens have probabilities from near 0 to near 1.

    All numbers are bfloat16 numbers, whatever type they are held in, so that no input is rounded.
    """

    ids: Tensor  # [B, T]: the hidden states lean to the embeddings of these tokens
    hidden: Tensor  # [B, T, H]
    head: Tensor  # [V, H]
    labels: Tensor  # [B, T]

    @property
    def vocab_size(self) -> int:
        return len(self.head)

    @property
    def hidden_size(self) -> int:
        return self.head.shape[1]


@pytest.fixture(scope="module")
def problem(device: torch.device) -> Problem:
    is_small = device.type == "cpu"
    batch, length, hidden_size, vocab_size = (2, 33, 32, 211) if is_small else (4, 257, 256, 8003)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocab_size, hidden_size, generator=generator) * 3 / hidden_size**0.5
    ids = torch.randint(vocab_size, (batch, length), generator=generator)
    strength = 1.5 * torch.rand(batch, length, 1, generator=generator)
    hidden = head[ids] * strength + torch.randn(batch, length, hidden_size, generator=generator) / 4
    labels = ids.roll(1, dims=1)  # what the hidden states before them lean to
    labels[torch.rand(batch, length, generator=generator) < 0.3] = vocab_size // 2  # unlikely tokens
    labels[torch.rand(batch, length, generator=generator) < 0.4] = -100
    hidden, head = hidden.bfloat16(), head.bfloat16()
    return Problem(*(x.to(device) for x in (ids, hidden, head, labels)))


@dataclass
class Found:
    """A loss, its gradients, None of what is frozen, and the statistics of its tokens."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    p_correct: Tensor
    entropy: Tensor


def chunk_mb(problem: Problem, is_chunked: bool) -> float:
    return (7 if is_chunked else 10**6) * 4 * problem.vocab_size / 1e6


def inputs_of(problem: Problem, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states as the loss gets them; hidden states and head as leaves of the gradient."""
    hidden, head = (x.detach().to(dtype).requires_grad_() for x in (problem.hidden, problem.head))
    if kind == "frozen":
        head.requires_grad_(False)
    return (nn.functional.embedding(problem.ids, head) if kind == "tied" else hidden), hidden, head


def found_by_head(problem: Problem, kind: str, precision: Precision, is_chunked: bool) -> Found:
    used, hidden, head = inputs_of(problem, kind, precision.held)
    with precision.autocast(used.device):
        own = {"chunk_mb": chunk_mb(problem, is_chunked), "needs": Needs(entropy=True)}
        loss, tokens = fused_dft_loss_sum(used, head, problem.labels, TokenWeight(ALPHA), **own)
    (loss / 7).backward()
    return Found(loss.detach(), {"hidden": hidden.grad, "head": head.grad}, tokens.p_correct, tokens.entropy)


def expected_of_head(problem: Problem, kind: str, **mutation) -> tuple[Reference, dict[str, Tensor | None]]:
    used, hidden, head = inputs_of(problem, kind, torch.float64)
    expected = reference(used @ head.T, problem.labels, ALPHA, **mutation)
    (expected.loss / 7).backward()
    return expected, {"hidden": hidden.grad, "head": head.grad}


def check_statistics(found: Found, expected: Reference, rounding: float) -> None:
    assert relative_error(found.loss.double(), expected.loss) < rounding
    assert relative_error(found.p_correct.double(), expected.p_correct) < rounding
    assert relative_error(found.entropy.double(), expected.entropy) < rounding


def check_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], rounding: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert relative_error(found[name].double(), gradient) < rounding, name


@pytest.mark.parametrize("is_chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("kind", ["untied", "tied", "frozen"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_fused_head_equals_float64(problem, name, kind, is_chunked):
    """The logits, and with them loss and statistics, are float32 sums of exact products in any type.

    The gradient of the logits is rounded to the type of the products, the hidden states are where they are multiplied
    by the weights of their tokens, and both gradients are where they are returned; a tied head adds two of them.
    """
    precision = PRECISIONS[name]
    found = found_by_head(problem, kind, precision, is_chunked)
    expected, gradients = expected_of_head(problem, kind)
    check_statistics(found, expected, tolerance(torch.float32, 1, problem.hidden_size))
    rounding = tolerance(precision.computed, 4, problem.hidden_size)
    check_gradients(found.gradients, gradients, rounding)
    for mutation in MUTANTS.values():
        _, gradients = expected_of_head(problem, kind, **mutation)
        with pytest.raises(AssertionError):
            check_gradients(found.gradients, gradients, 3 * rounding)


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_kernel_equals_float64(problem, monkeypatch, name):
    """It is the one that a GPU uses; on a processor it is interpreted."""
    kernel = pytest.importorskip("dft.loss.softmax_kernel", reason="triton is not installed")
    calls = []

    def counted(*args):
        calls.append(args)
        return by_kernel(*args)

    by_kernel = kernel.softmax_gradient
    monkeypatch.setattr(kernel, "softmax_gradient", counted)
    if problem.head.device.type == "cpu":
        monkeypatch.setattr(fused, "softmax_gradient_", softmax._by_kernel)
    found = found_by_head(problem, "untied", PRECISIONS[name], is_chunked=True)
    assert len(calls) == -(-len(found.p_correct) // 7)
    expected, gradients = expected_of_head(problem, "untied")
    check_statistics(found, expected, tolerance(torch.float32, 1, problem.hidden_size))
    check_gradients(found.gradients, gradients, tolerance(PRECISIONS[name].computed, 4, problem.hidden_size))


# ---- heads that are called ----------------------------------------------------------------------


class Adapted(nn.Module):
    """A head with a LoRA adapter, as peft makes it, whose weights are bfloat16 numbers."""

    def __init__(self, head: Tensor):
        super().__init__()
        peft = pytest.importorskip("peft", reason="peft is not installed")
        self.head = nn.Linear(head.shape[1], len(head), bias=False, device=head.device)
        self.head.weight.data.copy_(head)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["head"]), self)
        for name, parameter in self.named_parameters():
            if "lora_B" in name:  # zero at first
                nn.init.normal_(parameter, std=0.05)
            parameter.data.copy_(parameter.data.bfloat16())


def gradients_of(module: nn.Module, hidden: Tensor) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()} | {"hidden": hidden.grad}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", ["float32", "bfloat16 by autocast"])
def test_a_head_with_an_adapter_equals_float64(problem, name, is_chunked):
    """In 16 bits the head's own logits are rounded: that of a token changes by up to its size in unit roundoffs."""
    precision = PRECISIONS[name]
    device, labels = problem.head.device, problem.labels
    module, hidden = Adapted(problem.head), problem.hidden.float().requires_grad_()
    mb = chunk_mb(problem, is_chunked)
    with precision.autocast(device):
        loss, tokens = chunked_dft_loss_sum(
            hidden,
            module.head,
            labels,
            TokenWeight(ALPHA),
            chunk_mb=mb,
            vocab_size=problem.vocab_size,
            needs=Needs(entropy=True),
        )
    (loss / 7).backward()
    found = Found(loss.detach(), gradients_of(module, hidden), tokens.p_correct, tokens.entropy)
    roundings = 1 if name == "float32" else 12
    rounding = tolerance(precision.computed, roundings, problem.hidden_size)
    expected, gradients = expected_of_adapted(problem)
    check_statistics(found, expected, rounding)
    check_gradients(found.gradients, gradients, rounding)
    for mutation in MUTANTS.values():
        with pytest.raises(AssertionError):
            check_gradients(found.gradients, expected_of_adapted(problem, **mutation)[1], rounding)


def expected_of_adapted(problem: Problem, **mutation) -> tuple[Reference, dict[str, Tensor | None]]:
    module, hidden = Adapted(problem.head).double(), problem.hidden.double().requires_grad_()
    expected = reference(module.head(hidden), problem.labels, ALPHA, **mutation)
    (expected.loss / 7).backward()
    return expected, gradients_of(module, hidden)


# ---- inside a model -----------------------------------------------------------------------------


def test_the_loss_inside_a_model_equals_float64(device):
    """A tied head, called by the model's forward: the gradients of all weights, through two layers in float32."""
    model = make_model(600, hidden_size=32, num_layers=2).to(device)
    ids = torch.randint(3, 600, (3, 40), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    head = LossHead(model, chunk_mb=7 * 4 * 600 / 1e6)
    with head.computing(labels, TokenWeight(ALPHA)) as result:
        outputs = model(input_ids=ids, use_cache=False)
    head.check(outputs.logits)
    loss, _ = result.take(outputs.logits)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    exact = make_model(600, hidden_size=32, num_layers=2).double().to(device)

    def expected_gradients(**mutation) -> dict[str, Tensor | None]:
        exact.zero_grad()
        reference(exact(input_ids=ids, use_cache=False).logits, labels, ALPHA, **mutation).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in exact.named_parameters()}

    rounding = tolerance(torch.float32, 20, 96)  # of two layers, each of some ten operations
    check_gradients(found, expected_gradients(), rounding)
    for mutation in MUTANTS.values():
        with pytest.raises(AssertionError):
            check_gradients(found, expected_gradients(**mutation), 10 * rounding)
