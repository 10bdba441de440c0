"""The FlashAttention packages that transformers can call, and whether one of them can compute a model on this GPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from dft.model.shapes import head_sizes

MAX_HEAD_DIM = 256  # of all versions


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The transformers class that a configuration is loaded as; None if the model brings its own code."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@dataclass(frozen=True)
class FlashAttention:
    """One version of FlashAttention.

    Args:
        name: the attention implementation, as transformers calls it.
        package: what it is installed as.
        gpus: on which it trains, in words.
        majors: the first numbers of their compute capabilities.
        has_dropout: whether it knows dropout in attention.
    """

    name: str
    package: str
    gpus: str
    majors: tuple[int, ...]
    has_dropout: bool = False

    @property
    def needs(self) -> str:
        """What it takes to run, in words."""
        more = "" if self.has_dropout else " and without dropout in attention"
        return f"{self.gpus}, the package {self.package}, 16-bit training and a model that knows it{more}"

    def can_run(self, config: PretrainedConfig, is_16_bit: bool) -> bool:
        """Whether it is installed and supports this machine's GPU and this model."""
        return is_16_bit and IS_INSTALLED[self.name]() and self._knows_gpu() and self._knows_model(config)

    def _knows_gpu(self) -> bool:
        # AMD's GPUs, which have numbers of their own, are left to version 2
        is_known_maker = self.name == "flash_attention_2" or torch.version.hip is None
        return is_known_maker and torch.cuda.get_device_capability()[0] in self.majors

    def _knows_model(self, config: PretrainedConfig) -> bool:
        model_class, text = model_class_of(config), config.get_text_config()
        if model_class is not None:
            compatible = model_class._compatible_flash_implementations
            if not model_class._supports_flash_attn or (compatible and self.name not in compatible):
                return False
        if not self.has_dropout and getattr(text, "attention_dropout", None):
            return False
        try:
            head_dim = max(head_sizes(text))
        except (AttributeError, RuntimeError):  # RuntimeError is raised where head_dim differs by layer
            return self.name == "flash_attention_2"
        return self._knows_head_size(head_dim)

    def _knows_head_size(self, head_dim: int) -> bool:
        if self.name == "flash_attention_2":  # which fills up sizes that are no multiple of 8
            return head_dim <= MAX_HEAD_DIM
        # on Blackwell, version 4 has kernels for up to 128, and for exactly 256
        largest = MAX_HEAD_DIM if torch.cuda.get_device_capability()[0] == 9 else 128
        return head_dim % 8 == 0 and (head_dim <= largest or head_dim == MAX_HEAD_DIM)


IS_INSTALLED: dict[str, Callable[[], bool]] = {
    "flash_attention_4": is_flash_attn_4_available,
    "flash_attention_3": is_flash_attn_3_available,
    "flash_attention_2": is_flash_attn_2_available,
}
# From the newest on, as they are chosen. Version 3 is written for Hopper alone; version 4 has no backward pass on
# Ampere, and a slow one on the smaller Blackwell GPUs (12).
FLASH_ATTENTIONS = {
    flash.name: flash
    for flash in (
        FlashAttention("flash_attention_4", "flash-attn-4", "an NVIDIA Hopper or Blackwell GPU", (9, 10, 11)),
        FlashAttention("flash_attention_3", "flash-attn-3", "an NVIDIA Hopper GPU", (9,)),
        FlashAttention(
            "flash_attention_2", "flash-attn", "an NVIDIA GPU (Ampere or newer)", tuple(range(8, 20)), has_dropout=True
        ),
    )
}


def newest_flash_attention(config: PretrainedConfig, is_16_bit: bool) -> str | None:
    """The name of the newest version that can run; None where none can."""
    return next((name for name, flash in FLASH_ATTENTIONS.items() if flash.can_run(config, is_16_bit)), None)
