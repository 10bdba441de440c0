"""MFU, the share of a GPU's peak that training reaches: model FLOPs, device peaks, memory."""

import logging
import re
import resource

import torch
from torch import nn
from transformers import PreTrainedModel

from dft.model.shapes import head_sizes

logger = logging.getLogger(__name__)

# TFLOP/s of dense 16-bit matrix products with 32-bit accumulation, from the vendors' datasheets. A key matches a
# device whose name holds all its words. The first match counts, so variants stand before the plain name.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_tflops_of(name: str) -> float | None:
    """The 16-bit peak of a device, in TFLOP/s, by the name that CUDA gives it; None if it isn't known."""
    words = set(re.split(r"[\s-]+", name))
    if "Laptop" in words:  # laptops' GPUs are slower, and how much depends on the maker's power limit
        return None
    return next((peak for known, peak in PEAK_TFLOPS.items() if set(known.split()) <= words), None)


def peak_tflops(device: torch.device) -> float | None:
    """The 16-bit peak of a device, in TFLOP/s; None if it isn't known, and on CPU."""
    return peak_tflops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class ModelFlops:
    """Counts the floating-point operations that training a model takes, not those of recomputed activations.

    A weight of a matrix product costs 2 operations per token in the forward pass, 2 for the gradient of its inputs
    and, if it is trained, 2 for its own gradient (Kaplan et al., arXiv 2001.08361). Of a mixture, only the experts
    count that a token is routed to; the head counts for supervised tokens only. Attention costs
    12·layers·heads·head size for every pair of tokens of a document (Chowdhery et al., arXiv 2204.02311, appendix B),
    as if each token saw its whole document, although it sees half on average; MFU is commonly reported this way.

    Args:
        model: not wrapped and, except under ZeRO-3, not sharded.

    Attributes:
        per_token, per_supervised: operations of each token, and of each supervised token in addition.
        per_pair: operations of attention for each pair of tokens of a document.

    Raises:
        AttributeError, RuntimeError, TypeError: the model's parts are not where they are looked for.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        # embedding tables are looked up, which takes no operations
        tables = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        num_experts = next((n for key in _NUM_EXPERTS if (n := getattr(config, key, None))), 0)
        share_routed = config.num_experts_per_tok / num_experts if num_experts else 1.0
        self.per_token = sum(
            _flops_per_token(p) * (share_routed if _is_expert_weight(name, p, num_experts) else 1.0)
            for name, p in decoder.named_parameters()
            if id(p) not in tables and len(_full_shape(p)) >= 2
        )
        self.per_supervised = sum(_flops_per_token(p) for p in head.parameters() if len(_full_shape(p)) >= 2)
        self.per_pair = 6.0 * config.num_hidden_layers * config.num_attention_heads * sum(head_sizes(config))

    def __call__(self, tokens: float, supervised: float, pairs: float) -> float:
        """Operations for so many tokens, supervised tokens, and pairs of tokens of the same document."""
        return self.per_token * tokens + self.per_supervised * supervised + self.per_pair * pairs


_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names that configurations give the number


def _is_expert_weight(name: str, parameter: nn.Parameter, num_experts: int) -> bool:
    """Whether a weight belongs to experts: kept one by one under this name, or all in one tensor [experts, ., .]."""
    shape = _full_shape(parameter)
    return ".experts." in name or (len(shape) == 3 and shape[0] == num_experts)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight; ZeRO-3 empties the weight itself and keeps its shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _flops_per_token(parameter: nn.Parameter) -> float:
    """Operations that a weight takes for each token, forward and backward."""
    return _full_shape(parameter).numel() * (6.0 if parameter.requires_grad else 4.0)


def model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """Makes ModelFlops; None for a model whose parts are not where they are looked for."""
    try:
        return ModelFlops(model)
    except (AttributeError, RuntimeError, TypeError) as error:  # RuntimeError: Gemma 4's head_dim differs by layer
        logger.info("No mfu: %s", error)
        return None


def peak_memory_gib(device: torch.device) -> float:
    """The peak of memory so far, in GiB: allocated on a CUDA device, else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives ru_maxrss in KiB
