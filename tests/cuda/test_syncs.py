"""The loss of a micro-batch makes the host wait for the GPU in two places only.

The loss has to know how many tokens are supervised. Before the layers, transformers looks at the position ids for
documents, for which it would make a mask. A host that waits can't queue the next kernels meanwhile. What waits only
once, or once a step, is not looked at: the checks of the first micro-batch, and that of a step's losses for NaN.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from dft.batching import varlen_attention as varlen
from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.loss import fused
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.helpers import rows

pytestmark = pytest.mark.cuda

OPERATIONS_THAT_WAIT = ("nonzero", "_local_scalar_dense", "masked_select", "bincount", "_unique2", "unique_dim")


class RefuseWaiting(TorchDispatchMode):
    """On a processor: raises where an operation would wait on a GPU, because what follows depends on its values."""

    def __init__(self):
        super().__init__()
        self.is_allowed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if not self.is_allowed and (by_mask or name in OPERATIONS_THAT_WAIT):
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


class NoWaiting:
    """Raises RuntimeError where the host would wait for the device, until it is left, and except in `allowed`."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._mode = RefuseWaiting()
        self.is_watching = False
        self.waits: list[str] = []  # the functions that were allowed to

    def __enter__(self):
        self.is_watching = True
        if self._is_cuda:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        else:
            self._mode.__enter__()
        return self

    def __exit__(self, *exception):
        self.is_watching = False
        if self._is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        else:
            self._mode.__exit__(*exception)

    @contextmanager
    def allowed(self, name: str) -> Iterator[None]:
        self.waits.append(name)
        self._mode.is_allowed = True
        if self._is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        yield
        self._mode.is_allowed = False
        if self._is_cuda:
            torch.cuda.set_sync_debug_mode("error")


def kernel_without_waiting(query, key, value, boundaries, longest, scale, window) -> Tensor:
    """Stands in for PyTorch's kernels on a processor: attention of tensors [S, heads, E] with a mask of S × S."""
    place = torch.arange(len(query), device=query.device)
    document = torch.bucketize(place, boundaries[1:], right=True)
    is_seen = (document[:, None] == document) & (place[:, None] >= place)
    repeats = query.shape[1] // key.shape[1]
    query, key, value = (x.transpose(0, 1) for x in (query, *(x.repeat_interleave(repeats, 1) for x in (key, value))))
    scores = (query @ key.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)).masked_fill(~is_seen, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ value).transpose(0, 1)


@pytest.fixture
def watch(monkeypatch, device) -> NoWaiting:
    """Refuses to wait once it is entered. Without a GPU, attention is computed by a stand-in for the kernels."""
    watch = NoWaiting(device)
    for module, name in ((fused, "supervised_rows"), (masking_utils, "find_packed_sequence_indices")):
        monkeypatch.setattr(module, name, partial(allowing, watch, getattr(module, name)))
    if device.type == "cpu":
        monkeypatch.setattr(varlen, "kernel_takes", lambda *_: True)
        monkeypatch.setattr(varlen, "_by_kernel", kernel_without_waiting)
    return watch


def allowing(watch: NoWaiting, function: Callable, *args, **kwargs):
    if not watch.is_watching:
        return function(*args, **kwargs)
    with watch.allowed(function.__name__):
        return function(*args, **kwargs)


@pytest.fixture
def trainer_of(make_trainer, device) -> Callable[..., DFTTrainer]:
    """Makes a trainer with channels and plain tokens."""

    def make(**settings) -> DFTTrainer:
        varlen.register()
        model = make_model(600, hidden_size=32, num_layers=2)
        model.set_attn_implementation("varlen")
        own = {"dft_alpha": 0.7, "plain_tokens": [2, 5], "channels": "ab"}
        trainer = make_trainer(model, use_cpu=device.type == "cpu", **own, **settings)
        trainer.model.to(device).train()
        return trainer

    return make


def micro_batch(device: torch.device, collator) -> dict:
    """A micro-batch with channels, on the device."""
    batch = collator([{**row, "channel": i % 2} for i, row in enumerate(rows(6))])
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def one_micro_batch(trainer: DFTTrainer, batch: dict, watch: NoWaiting) -> torch.Tensor:
    """The loss, the metrics and the backward pass of the first of a step's two micro-batches."""
    trainer._finite_check.begin(2)
    device = trainer.model.device
    count = torch.tensor(100, device=device)
    with watch, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
    return loss.detach()


class NotWatching(NoWaiting):
    """For the first micro-batch, in which the model is checked and the loss compiled."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


@pytest.mark.parametrize("settings", [{}, {"log_entropy": True}], ids=["", "entropy"])
def test_a_micro_batch_without_padding_waits_twice(trainer_of, watch, device, settings):
    trainer = trainer_of(**settings)
    batch = micro_batch(device, FlatteningCollator())
    first = one_micro_batch(trainer, batch, NotWatching(device))
    loss = one_micro_batch(trainer, batch, watch)
    assert watch.waits == ["find_packed_sequence_indices", "supervised_rows"]
    torch.testing.assert_close(loss, first, rtol=1e-3, atol=0)


def test_the_loss_of_a_padded_micro_batch_waits_once(trainer_of, watch, device, tokenizer, monkeypatch):
    """transformers looks into the mask as often as it likes: what the model's layers wait for is not looked at."""
    trainer = trainer_of()
    batch = micro_batch(device, PaddingCollator(tokenizer))
    one_micro_batch(trainer, batch, NotWatching(device))
    forward = trainer.model.model.forward
    monkeypatch.setattr(trainer.model.model, "forward", partial(allowing, watch, forward))
    one_micro_batch(trainer, batch, watch)
    assert watch.waits == ["forward", "supervised_rows"]


def test_what_waits_is_refused(watch, device):
    """The watch itself finds an operation that waits, and lets one pass that is allowed."""
    values = torch.arange(4, device=device)
    with watch:
        with pytest.raises(RuntimeError, match="synchronizing"):
            values.nonzero()
        with pytest.raises(RuntimeError, match="synchronizing"):
            values.sum().item()
        with pytest.raises(RuntimeError, match="synchronizing"):
            values[values > 1]
        with watch.allowed("this"):
            values.nonzero()
    assert values.sum().item() == 6
