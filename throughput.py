"""How fast a run is against what its GPU could do: floating-point operations, peaks, memory."""

import resource

import torch
from torch import nn
from transformers import PreTrainedModel

# TFLOP/s of dense 16-bit matrix products with 32-bit sums, from the makers' datasheets, by a part of the name (the
# first that is in it counts)
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
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


def peak_tflops(device: torch.device) -> float | None:
    """What the device could do at most in 16 bits, in TFLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


class ModelFlops:
    """Floating-point operations that training a model needs, without those of recomputed activations.

    A parameter costs 2 operations a token forward, 2 for the gradient of its inputs and, if it is trained, 2 for its
    own (Kaplan et al., arXiv 2001.08361). Of a mixture, the experts that a token visits count; of the head, the
    supervised tokens. Attention costs 12·layers·heads·head_dim for every pair of tokens of a document (Chowdhery et
    al., arXiv 2204.02311, appendix B), as if each token saw its whole document: the custom of the field.

    Args:
        model: not wrapped and, but for ZeRO-3, not sharded.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        apart = {id(p) for module in (head, embedding) if module is not None for p in module.parameters()}
        experts = next((n for key in _NUM_EXPERTS if (n := getattr(config, key, None))), 0)
        visited = getattr(config, "num_experts_per_tok", experts) / experts if experts else 1.0
        self.per_token = sum(
            _cost(p) * (visited if ".experts." in name else 1.0)
            for name, p in model.named_parameters()
            if id(p) not in apart and len(_shape(p)) >= 2
        )
        self.per_supervised = sum(_cost(p) for p in head.parameters() if len(_shape(p)) >= 2) if head else 0.0
        heads = getattr(config, "num_attention_heads", 0)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        self.per_pair = 12.0 * getattr(config, "num_hidden_layers", 0) * heads * head_dim

    def __call__(self, tokens: float, supervised: float, pairs: float) -> float:
        """Of so many tokens, supervised tokens, and pairs of tokens of the same document."""
        return self.per_token * tokens + self.per_supervised * supervised + self.per_pair * pairs


_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3


def _cost(parameter: nn.Parameter) -> float:
    """Operations a token."""
    return _shape(parameter).numel() * (6.0 if parameter.requires_grad else 4.0)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: allocated on the device, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # ru_maxrss is in KiB on Linux
