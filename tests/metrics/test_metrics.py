"""Sums over tokens: no waiting for the device, one reduction for a record, no metrics of sources without tokens."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dft.batching.collators import PaddingCollator
from dft.loss.from_logits import TokenStatistics
from dft.metrics.token_sums import TokenSums, channel_averages


class Transfers(TorchDispatchMode):
    """Notes what makes the host wait for the device: reads of values, and copies between the two."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        after = {result.device.type} if isinstance(result, torch.Tensor) else set()
        if before and len(before | after) > 1:
            self.found.append(str(func))
        return result


def add_one(sums: TokenSums, device: str) -> None:
    n = 5
    tokens = TokenStatistics(
        targets=torch.zeros(n, dtype=torch.int64, device=device),
        nll=torch.ones(n, device=device),
        p_correct=torch.full((n,), 0.5, device=device),
        is_top1=torch.ones(n, dtype=torch.bool, device=device),
        entropy=torch.ones(n, device=device),
        weight=torch.full((n,), 0.5, device=device),
    )
    loss, terms = torch.ones((), device=device), torch.full((), n, device=device)
    lengths, channel = torch.full((2,), 4, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    sums.add(loss, terms, tokens, tokens.is_top1, lengths, 8, channel)


def test_a_micro_batch_is_added_without_waiting_for_the_device():
    """On a GPU that isn't there: values that are asked for raise, copies between host and device are noted."""
    with FakeTensorMode(), Transfers() as transfers:
        sums = TokenSums(torch.device("cuda"), num_channels=2)
        add_one(sums, "cuda")
        assert sums.values.device.type == "cuda"
        assert transfers.found == []
        torch.as_tensor(3, device="cuda")  # what `add` must not do
        assert transfers.found


def test_a_record_is_one_reduction(make_trainer, monkeypatch):
    """Of everything: sources, entropy, health."""
    trainer = make_trainer(channels=["a", "b", "c"], log_entropy=True)
    trainer.train()
    calls = []
    reduce = trainer.accelerator.reduce
    monkeypatch.setattr(
        trainer.accelerator, "reduce", lambda *args, **kwargs: calls.append(1) or reduce(*args, **kwargs)
    )
    record = trainer._train_metrics.record(trainer.accelerator, 3, 1.0)
    assert {"loss", "ce_loss", "entropy", "mean_weight", "tokens_per_second"} <= set(record)
    assert len(calls) == 1


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: how many are not zero, masks as indices, values that are read."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_mask = func is torch.ops.aten.index.Tensor and any(i.dtype == torch.bool for i in args[1] if i is not None)
        waiting = (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        self.count += is_mask or func in waiting
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused_loss", ["on", "off"])
def test_a_micro_batch_waits_once_with_metrics_of_sources_or_without(make_trainer, tokenizer, fused_loss):
    """Besides the model itself: for which tokens are supervised, which the loss has to know."""
    counts = {}
    for channels in ((), ("a", "b")):
        trainer = make_trainer(channels=channels, log_entropy=True, fused_loss=fused_loss)
        items = [{**row, "channel": i % 2} for i, row in enumerate(trainer.train_dataset.select(range(4)))]
        batch = PaddingCollator(tokenizer)(items)
        trainer.compute_loss(trainer.model.train(), dict(batch))  # the first looks at the head
        with Waits() as waits:
            trainer.compute_loss(trainer.model, dict(batch))
        with Waits() as of_model:
            trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        counts[channels] = waits.count - of_model.count
        assert trainer._train_metrics.sums.values[TokenSums.COUNT :].sum() > 0 or not channels
    assert counts == {(): 1, ("a", "b"): 1}


def test_sources_without_tokens_have_no_metrics():
    sums = TokenSums(torch.device("cpu"), num_channels=2)
    add_one(sums, "cpu")
    found = channel_averages(sums.values.tolist(), ["a", "b"])
    assert found == {"channel/a/ce_loss": 1.0, "channel/a/p_correct": 0.5, "channel/a/acc": 1.0}
