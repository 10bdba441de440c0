"""Objectives that need more than p, in the fused head of this device, against their logits on the processor."""

import pytest
import torch

from dft.config.loss import LossConfig
from dft.loss.from_logits import TokenData, dft_loss_sum
from dft.loss.fused import fused_dft_loss_sum
from dft.loss.objectives import make_objective
from dft.loss.token_weight import TokenWeight
from tests.helpers import relative_error

pytestmark = pytest.mark.cuda

V, H, N = 1000, 64, 200


@pytest.mark.parametrize("name", ["eaft", "deft", "idft", "talr", "anchored", "importance"])
def test_an_objective_has_the_gradient_from_logits(device, name):
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=generator) / 4
    labels = torch.randint(V, (1, N), generator=generator)
    hidden = torch.randn(1, N, H, generator=generator)
    hidden[0, :-1:2] += 2 * head[labels[0, 1::2]]  # of every second token the model is rather sure
    reference_log_p = -3 * torch.rand(N - 1, generator=generator)
    weight = TokenWeight(objective=make_objective(LossConfig(objective=name)))

    inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    expected, _ = dft_loss_sum(inputs[0] @ inputs[1].T, labels, weight, TokenData(reference_log_p=reference_log_p))
    expected.backward()
    ours = [x.detach().to(device).requires_grad_() for x in (hidden, head)]
    data = TokenData(reference_log_p=reference_log_p.to(device))
    loss, tokens = fused_dft_loss_sum(*ours, labels.to(device), weight, data, chunk_mb=30 * 4 * V / 1e6)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for x, y in zip(ours, inputs, strict=True):
        assert relative_error(x.grad.cpu(), y.grad) < 1e-4
    mixed = TokenWeight(objective=lambda tokens: weight.objective(tokens).roll(1))
    mixed.objective.needs = weight.needs
    other, _ = fused_dft_loss_sum(*ours, labels.to(device), mixed, data, chunk_mb=30 * 4 * V / 1e6)
    assert other.item() != pytest.approx(expected.item(), rel=1e-3)
