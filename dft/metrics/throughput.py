"""How fast a run is against what its GPU could do: floating-point operations, peaks, memory."""

import logging
import re
import resource

import torch
from torch import nn
from transformers import PreTrainedModel

from dft.model.shapes import head_sizes

logger = logging.getLogger(__name__)

# TFLOP/s of dense 16-bit matrix products with 32-bit sums, from the makers' datasheets, by words of the device's name
# (the first whose words are all there counts)
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
    """What a device of this name could do at most in 16 bits, in TFLOP/s; None where that is not known."""
    words = set(re.split(r"[\s-]+", name))
    if "Laptop" in words:
        return None
    return next((peak for known, peak in PEAK_TFLOPS.items() if set(known.split()) <= words), None)


def peak_tflops(device: torch.device) -> float | None:
    """The same for a device."""
    return peak_tflops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class ModelFlops:
    """Floating-point operations that training a model needs, without those of recomputed activations.

    A weight of a matrix product costs 2 operations a token forward, 2 for the gradient of its inputs and, if it is
    trained, 2 for its own (Kaplan et al., arXiv 2001.08361). Of a mixture, the experts that a token visits count; of
    the head, the supervised tokens. Attention costs 12·layers·heads·head size for every pair of tokens of a document
    (Chowdhery et al., arXiv 2204.02311, appendix B), as if each token saw its whole document: the custom of the field.

    Args:
        model: not wrapped and, but for ZeRO-3, not sharded.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        tables = {id(p) for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        experts = next((n for key in _NUM_EXPERTS if (n := getattr(config, key, None))), 0)
        visited = config.num_experts_per_tok / experts if experts else 1.0
        self.per_token = sum(
            _cost(p) * (visited if _is_of_experts(name, p, experts) else 1.0)
            for name, p in decoder.named_parameters()
            if id(p) not in tables and len(_shape(p)) >= 2
        )
        self.per_supervised = sum(_cost(p) for p in head.parameters() if len(_shape(p)) >= 2)
        self.per_pair = 6.0 * config.num_hidden_layers * config.num_attention_heads * sum(head_sizes(config))

    def __call__(self, tokens: float, supervised: float, pairs: float) -> float:
        """Of so many tokens, supervised tokens, and pairs of tokens of the same document."""
        return self.per_token * tokens + self.per_supervised * supervised + self.per_pair * pairs


_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _is_of_experts(name: str, parameter: nn.Parameter, experts: int) -> bool:
    shape = _shape(parameter)
    return ".experts." in name or (len(shape) == 3 and shape[0] == experts)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3


def _cost(parameter: nn.Parameter) -> float:
    """Operations a token."""
    return _shape(parameter).numel() * (6.0 if parameter.requires_grad else 4.0)


def model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """ModelFlops, or None for a model whose parts are not where they are looked for."""
    try:
        return ModelFlops(model)
    except (AttributeError, RuntimeError, TypeError) as error:  # RuntimeError: Gemma 4's head_dim differs by layer
        logger.info("No mfu: %s", error)
        return None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the device, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB on Linux
