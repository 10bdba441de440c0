"""Variable-length attention on a GPU against attention written out in float64, one document after the other."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dft.batching import varlen_attention as varlen
from dft.batching.collators import boundary_arguments
from tests.cuda.precision import tolerance
from tests.helpers import relative_error

pytestmark = pytest.mark.cuda

LENGTHS = {"cuda": [129, 1, 64, 300], "cpu": [13, 1, 30, 6]}
WINDOWS = {"cuda": [None, 2, 48], "cpu": [None, 2, 5]}
# of the probabilities and of the result in the forward pass; of those, of their gradients, of the gradients of the
# result and of queries, keys and values in the backward pass
ROUNDINGS = {"forward": 3, "backward": 8}


def eager(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None) -> Tensor:
    """Causal attention of tensors [1, heads, T, E], with documents of these lengths -> [1, T, heads, E]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    parts = []
    for q, k, v in zip(*(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True):
        place = torch.arange(q.shape[1], device=q.device)
        distance = place[:, None] - place
        is_seen = (distance >= 0) & (distance < (window or math.inf))
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~is_seen, -math.inf)
        parts.append(torch.softmax(scores, dim=-1) @ v)
    return torch.cat(parts, dim=1).transpose(0, 1)[None]


def random_inputs(device: torch.device, heads: int, key_heads: int, dim: int, value_dim: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result: bfloat16 numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    length = sum(LENGTHS[device.type])
    shapes = [(1, heads, length, dim), (1, key_heads, length, dim), (1, key_heads, length, value_dim)]
    shapes.append((1, length, heads, value_dim))
    return [torch.randn(shape, generator=generator).bfloat16().double().to(device) for shape in shapes]


def result_and_gradients(attention, inputs: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    *leaves, upstream = (x.to(dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    out = attention(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, upstream))


def check(device: torch.device, dtype: torch.dtype, inputs: list[Tensor], window: int | None) -> None:
    """Asserts that varlen equals eager attention, which differs from that of other boundaries and windows."""
    lengths = LENGTHS[device.type]
    documents = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in boundary_arguments(lengths).items()
    }
    module = SimpleNamespace(is_causal=True, num_key_value_groups=inputs[0].shape[1] // inputs[1].shape[1])

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen.varlen_attention(module, query, key, value, None, 0.0, None, window, **documents)[0]

    def errors(lengths: list[int], window: int | None) -> tuple[float, float]:
        expected, wanted = result_and_gradients(lambda *x: eager(*x, lengths, window), inputs, torch.float64)
        pairs = zip(gradients, wanted, strict=True)
        return relative_error(out.double(), expected), max(relative_error(a.double(), b) for a, b in pairs)

    out, gradients = result_and_gradients(ours, inputs, dtype)
    assert out.dtype == dtype
    forward, backward = errors(lengths, window)
    terms = max(lengths) + inputs[0].shape[-1]
    assert forward < tolerance(dtype, ROUNDINGS["forward"], terms)
    assert backward < tolerance(dtype, ROUNDINGS["backward"], terms)
    # the boundaries of others move few tokens where a window is short
    mutants = [(lengths, 2 * window)] if window else [(lengths[::-1], None), ([sum(lengths)], None), (lengths, 8)]
    for mutant in mutants:
        assert min(errors(*mutant)) > 2 * tolerance(dtype, ROUNDINGS["backward"], terms)


@pytest.fixture
def kernel_calls(monkeypatch) -> list:
    """The number of heads of queries and of keys in each call of PyTorch's kernels."""
    from torch.nn.attention import varlen as torch_varlen

    calls, kernel = [], torch_varlen.varlen_attn

    def counted(query, key, *args, **kwargs):
        calls.append((query.shape[1], key.shape[1]))
        return kernel(query, key, *args, **kwargs)

    counted.__wrapped__ = kernel  # whose signature is looked at
    monkeypatch.setattr(torch_varlen, "varlen_attn", counted)
    return calls


@pytest.mark.parametrize("window", [0, 1, 2], ids=["full", "window of 2", "window"])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_go_through_the_kernels_of_torch(device, kernel_calls, dtype, dim, heads, key_heads, window):
    """On a processor, which has no such kernels, float32 goes from document to document."""
    is_cuda = device.type == "cuda"
    if not is_cuda and dtype == torch.float16:
        pytest.skip("only on CUDA")
    inputs = random_inputs(device, heads, key_heads, dim, dim)
    check(device, dtype if is_cuda else torch.float32, inputs, WINDOWS[device.type][window])
    assert [query_heads for query_heads, _ in kernel_calls] == ([heads] if is_cuda else [])


@pytest.mark.parametrize(("dim", "value_dim"), [(20, 20), (192, 128)])
def test_sizes_of_heads_that_are_filled_up(device, kernel_calls, dim, value_dim):
    """The kernels want a multiple of 8, and values as large as keys."""
    is_cuda = device.type == "cuda"
    inputs = random_inputs(device, 4, 2, dim, value_dim)
    check(device, torch.bfloat16 if is_cuda else torch.float32, inputs, None)
    assert len(kernel_calls) == is_cuda


@pytest.mark.parametrize("window", [0, 2], ids=["full", "window"])
def test_32_bits_go_from_document_to_document(device, kernel_calls, window):
    check(device, torch.float32, random_inputs(device, 8, 2, 64, 64), WINDOWS[device.type][window])
    assert not kernel_calls
