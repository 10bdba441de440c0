"""How long something takes on a GPU or a processor."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(action: Callable[[], Any], times: int, warm: int) -> list[float]:
    """How long an action takes each time: by CUDA events where there is a GPU, else by the clock."""
    for _ in range(warm):
        action()
    if not torch.cuda.is_available():
        return [_by_clock(action) for _ in range(times)]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _by_clock(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
