"""Which attention implementation a model is loaded with, and whether its documents may share a row."""

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from dist_logger import UserError, get_logger
from varlen_attention import VARLEN, register, why_not

logger = get_logger(__name__)

FLASH = "flash_attention_2"


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration stands for; None where the code comes with the model."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def choose_attention(wanted: str, config: PretrainedConfig, is_16_bit: bool, strict: bool = False) -> str:
    """The attention implementation to load a model with.

    Args:
        wanted: auto, or a name that transformers knows. auto is flash_attention_2 where it can run, else varlen
            where the model can use it, else sdpa.
        is_16_bit: whether attention is computed in 16 bits.
        strict: don't replace what is wanted.

    Raises:
        UserError: varlen is wanted for a model that can't use it, or flash_attention_2 can't run and strict is set.
    """
    register()
    reason = why_not(model_class_of(config), config.get_text_config())
    # the kernels need an Ampere GPU or a newer one
    can_flash = (
        is_16_bit
        and is_flash_attn_2_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and getattr(model_class_of(config), "_supports_flash_attn", True)
    )
    if wanted == VARLEN and reason is not None:
        raise UserError(f"--attn_implementation varlen: {reason}; leave it at auto")
    if wanted not in ("auto", FLASH):
        return wanted
    if can_flash:
        return FLASH
    chosen = VARLEN if reason is None else "sdpa"
    if wanted == FLASH:
        needs = "an NVIDIA GPU (Ampere or newer), the flash-attn package, 16-bit training and a model that knows it"
        problem = f"{FLASH} needs {needs}"
        if strict:
            raise UserError(f"{problem}; drop --attn_strict to use {chosen}")
        logger.warning("%s: using %s", problem, chosen)
    if reason is not None:
        logger.info("Attention: sdpa, because %s", reason)
    return chosen


def documents_leak(config: PretrainedConfig) -> str | None:
    """Why documents in one row would see each other with any attention, in words; None if nothing is known of it."""
    model_class = model_class_of(config)
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    if getattr(model_class, "_is_stateful", False) or any(
        kind == "linear_attention" or not kind.endswith("_attention") for kind in kinds
    ):
        return f"{type(config).__name__[:-6]} has recurrent layers, which carry one document into the next"
    if model_class is not None and not model_class._supports_attention_backend:
        return f"{model_class.__name__} computes attention in a way of its own"
    return None


def grows_with_square(config: PretrainedConfig, attention: str) -> bool:
    """Whether documents in one row cost memory and time for every pair of their tokens."""
    return (attention != VARLEN and "flash" not in attention) or model_class_of(config) is None
