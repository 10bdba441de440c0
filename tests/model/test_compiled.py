"""The hint at kernels for the layers: on GPUs, where neither they nor torch.compile are used."""

import logging
from types import SimpleNamespace

import pytest
import torch

from dft.model import compiled


@pytest.mark.parametrize(
    ("device", "use_liger_kernel", "torch_compile", "is_installed", "expected"),
    [
        ("cuda", False, False, True, "--use_liger_kernel True does it"),
        ("cuda", False, False, False, "--use_liger_kernel True (pip install liger-kernel) does it"),
        ("cuda", True, False, True, ""),
        ("cuda", False, True, True, ""),
        ("cpu", False, False, True, ""),
    ],
)
def test_where_faster_layers_are_pointed_to(
    monkeypatch, caplog, device, use_liger_kernel, torch_compile, is_installed, expected
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compiled, "is_liger_kernel_available", lambda: is_installed)
    args = SimpleNamespace(device=torch.device(device), use_liger_kernel=use_liger_kernel, torch_compile=torch_compile)
    compiled.point_to_kernels(args)
    assert expected in caplog.text
    assert bool(expected) == bool(caplog.text)
