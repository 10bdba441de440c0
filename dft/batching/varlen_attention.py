"""Variable-length attention: documents laid one after the other in one row, each of which sees only itself.

On a GPU with 16-bit numbers the FlashAttention kernels inside PyTorch compute it, so that nothing has to be built.
Elsewhere torch's scaled_dot_product_attention is called for one document after the other. No mask is made, so memory
grows with the number of tokens and not with its square. Registered with transformers under the name "varlen".

Shapes: B rows, T tokens of a row, S = B·T tokens of all rows, D documents, E dimensions of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dft.attention_kernel import has_kernel, kernel_groups_heads
from dft.batching.collators import boundaries_from_positions

VARLEN = "varlen"
KERNEL_HEAD_DIM = 256  # the kernels support heads of at most so many dimensions


def register() -> None:
    """Makes attn_implementation="varlen" known to transformers."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, varlen_mask)


def kernel_takes(dtype: torch.dtype, device: torch.device, head_dim: int, dropout: float = 0.0) -> bool:
    """Whether the kernels inside PyTorch support this: a GPU of at least Ampere, 16 bits, head_dim up to 256."""
    return why_no_kernel(dtype, device, head_dim, dropout) is None


def why_no_kernel(dtype: torch.dtype, device: torch.device, head_dim: int, dropout: float = 0.0) -> str | None:
    """What the kernels inside PyTorch don't support of this, in words; None if they compute it."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "PyTorch's FlashAttention needs an NVIDIA GPU (Ampere or newer)"
    if dtype not in (torch.bfloat16, torch.float16):
        return "PyTorch's FlashAttention needs 16-bit training"
    if head_dim > KERNEL_HEAD_DIM:
        return f"PyTorch's FlashAttention needs heads of up to {KERNEL_HEAD_DIM} dimensions, not {head_dim}"
    if dropout != 0.0:
        return "PyTorch's FlashAttention knows no dropout in attention"
    return why_outdated()


def why_outdated() -> str | None:
    """What this PyTorch's kernels lack, in words; None if they lack nothing."""
    if has_kernel():
        return None
    return f"PyTorch {torch.__version__} has no FlashAttention for documents with sliding windows; 2.11 has"


def varlen_mask(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """Makes the mask [B, 1, T, T] for padded rows or a cache; None for documents, which need no mask."""
    if attention_mask is None and q_length == kv_length and not use_vmap:
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs
    )


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; with a mask or a cache, or where it is not causal, that of sdpa.

    Args:
        query: [B, heads, T, E]; key and value are [B, key heads, T, E], where value may have another E.
        sliding_window: the number of tokens that a token sees, including itself.
        cu_seq_lens_q: int32 [D + 1], where documents begin in a row [1, T], and T. If None, documents begin where
            position_ids start anew, or else each row is one; finding that out waits for the device.
        max_length_q: tokens of the longest document.

    Returns:
        [B, T, heads, E], and no attention weights.

    Raises:
        ValueError: soft-capped scores, sinks, a bias, or documents where attention is not causal.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse_unsupported(kwargs, is_causal, has_documents=cu_seq_lens_q is not None)
    if attention_mask is not None or query.shape[2] != key.shape[2] or not is_causal:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = boundaries_from_positions(position_ids, batch, length, query.device)
        max_length_q = int(cu_seq_lens_q.diff().max())
    query, key, value = _flattened(query, key, value)
    if kernel_takes(query.dtype, query.device, max(query.shape[-1], value.shape[-1]), dropout):
        out = _by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        out = _by_document(query, key, value, cu_seq_lens_q, scaling, sliding_window, dropout)
    return out.unflatten(0, (batch, length)), None


def _refuse_unsupported(options: dict[str, Any], is_causal: bool, has_documents: bool) -> None:
    """Raises ValueError for what neither the kernels nor the loop compute, because ignoring it would be silent."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"varlen attention doesn't know {name}: use --attn_implementation eager")
    if not is_causal and has_documents:
        raise ValueError("varlen attention knows documents only where each token sees those before it")


def _flattened(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lays all rows one after the other, [B, heads, T, E] -> [S, heads, E], in the dtype that the model computes in.

    Norms and rotary embeddings may have left queries and keys in 32 bits where the model computes in 16.
    """
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    query, key, value = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return query, key, value


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention over tensors [S, heads, E] by PyTorch's own FlashAttention kernels; see varlen_attention."""
    from torch.nn.attention.varlen import varlen_attn

    dim, value_dim = query.shape[-1], value.shape[-1]
    # the kernels want one size for all three, a multiple of 8; zeros change neither the scores nor the sums
    size = max(dim, value_dim) + -max(dim, value_dim) % 8
    query, key, value = (x if x.shape[-1] == size else pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if kernel_groups_heads():
            options["enable_gqa"] = True
        else:
            key, value = _for_each_head(key, value, query.shape[1])
    out = varlen_attn(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=dim**-0.5 if scale is None else scale,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return out[..., :value_dim].contiguous()


def _for_each_head(key: Tensor, value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Repeats grouped heads of tensors [S, key heads, E], so that each head of the queries has its own."""
    repeats = num_heads // key.shape[1]
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


@torch.compiler.disable
def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Attention over tensors [S, heads, E], one document after the other; see varlen_attention.

    Not compiled, because the lengths of the documents would make it compile again for every batch.
    """
    lengths = boundaries.diff().tolist()
    if query.shape[1] != key.shape[1] and not use_gqa_in_sdpa(None, key, value):
        key, value = _for_each_head(key, value, query.shape[1])
    parts = []
    # split() and not slices, because the gradient of each slice would be a tensor as large as the whole
    for q, k, v in zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        is_local = window is not None and window < length
        part = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_local_mask(length, window, q.device) if is_local else None,
            is_causal=not is_local,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _local_mask(length: int, window: int, device: torch.device) -> Tensor:
    """The mask [T, T] of a sliding window: true where a token sees another, one of the last `window` up to itself."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)
