"""What the FlashAttention kernels inside this PyTorch can do, read from the arguments that they take."""

import inspect
from functools import lru_cache

import torch


@lru_cache
def kernel_options() -> frozenset[str]:
    """The arguments that this PyTorch's kernels take; empty without kernels."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@torch.compiler.assume_constant_result
def has_kernel() -> bool:
    """Whether this PyTorch has kernels that take a scale and sliding windows, as from version 2.11 on."""
    return {"scale", "window_size"} <= kernel_options()


@torch.compiler.assume_constant_result
def kernel_groups_heads() -> bool:
    """Whether this PyTorch's kernels take fewer heads of keys than of queries, as from version 2.13 on."""
    return "enable_gqa" in kernel_options()
