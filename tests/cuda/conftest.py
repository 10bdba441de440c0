"""Tests of a GPU, which are skipped without one.

    DFT_TEST_DEVICE=cuda python -m pytest tests/cuda -m "not launch"
    DFT_TEST_DEVICE=cuda python -m pytest tests/cuda

All other tests hide the GPU from the program, so these have to ask for it. DFT_TEST_DEVICE=cpu runs the same tests on
the processor with small sizes, which shows that they work, but says nothing about a GPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("DFT_TEST_DEVICE", "cuda")


def why_skipped(item: pytest.Item) -> str | None:
    """Why a test of this directory can't run here; None if it can."""
    if DEVICE == "cpu":
        return "only on CUDA" if item.get_closest_marker("only_on_cuda") else None
    if torch.cuda.is_available():
        return None
    is_hidden = "DFT_TEST_DEVICE" not in os.environ and Path("/dev/nvidiactl").exists()
    return "no CUDA: the GPU is hidden, set DFT_TEST_DEVICE=cuda" if is_hidden else "no CUDA"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips before fixtures are made."""
    reason = why_skipped(item)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device to test."""
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 products are computed in float32: with TF32, they would have the digits of 16 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
