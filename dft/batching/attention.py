"""Which attention implementation a model is loaded with, and whether its documents may share a row."""

import logging

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from dft.batching.varlen_attention import KERNEL_HEAD_DIM, VARLEN, kernel_takes, register
from dft.errors import UserError
from dft.model.shapes import head_sizes

logger = logging.getLogger(__name__)

FLASH = "flash_attention_2"
OWN_MASKS = ("doge", "phimoe", "qwen2_moe")  # model types whose masks know windows that their attention doesn't


def model_class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that a configuration stands for; None where the code comes with the model."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return None
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def choose_attention(wanted: str, config: PretrainedConfig, is_16_bit: bool, strict: bool = False) -> str:
    """The attention implementation to load a model with.

    Args:
        wanted: auto, or a name that transformers knows. auto is flash_attention_2 where it can run, else varlen
            where the model can use it and is not slowed down by it, else sdpa.
        is_16_bit: whether attention is computed in 16 bits.
        strict: don't replace what is wanted.

    Raises:
        UserError: varlen is wanted for a model that can't use it, or flash_attention_2 can't run and strict is set.
    """
    register()
    cannot, slow = why_not_varlen(config), why_slow(config, is_16_bit)
    if wanted == VARLEN:
        if cannot is not None:
            raise UserError(f"--attn_implementation varlen: {cannot}; leave it at auto")
        if slow is not None:
            logger.warning("--attn_implementation varlen goes from document to document: %s", slow)
    if wanted not in ("auto", FLASH):
        return wanted
    if is_16_bit and can_flash(config):
        return FLASH
    chosen = VARLEN if cannot is None and slow is None else "sdpa"
    if wanted == FLASH:
        needs = "an NVIDIA GPU (Ampere or newer), the flash-attn package, 16-bit training and a model that knows it"
        if strict:
            raise UserError(f"{FLASH} needs {needs}; drop --attn_strict to use {chosen}")
        logger.warning("%s needs %s: using %s", FLASH, needs, chosen)
    if chosen == "sdpa":
        logger.info("Attention: sdpa, because %s", cannot or slow)
    return chosen


def can_flash(config: PretrainedConfig) -> bool:
    """Whether flash_attention_2 is there, for this machine's GPU and this model."""
    return (
        is_flash_attn_2_available()
        and torch.cuda.get_device_capability() >= (8, 0)
        and getattr(model_class_of(config), "_supports_flash_attn", True)
    )


def why_slow(config: PretrainedConfig, is_16_bit: bool) -> str | None:
    """Why varlen would go from document to document on this machine's GPU, in words; None if not, or without a GPU."""
    if not torch.cuda.is_available():
        return None
    text = config.get_text_config()
    try:
        head_dim = max(head_sizes(text))
        dropout = getattr(text, "attention_dropout", 0.0) or 0.0
    except (AttributeError, RuntimeError) as error:  # RuntimeError: it differs by layer
        return f"the size of its heads is not known ({error})"
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    if kernel_takes(dtype, torch.device("cuda", torch.cuda.current_device()), head_dim, dropout):
        return None
    return (
        "PyTorch's FlashAttention needs torch 2.13, an NVIDIA GPU (Ampere or newer), 16-bit training, heads of up to "
        f"{KERNEL_HEAD_DIM} dimensions and no dropout in attention"
    )


def documents_leak(config: PretrainedConfig) -> str | None:
    """Why documents in one row would see each other with any attention, in words; None if nothing is known of it."""
    model_class, name = model_class_of(config), type(config).__name__[:-6]
    kinds = {kind for kind in _layer_types(config) if kind == "linear_attention" or not kind.endswith("_attention")}
    if kinds or getattr(model_class, "_is_stateful", False):
        which = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"{name} has recurrent layers{which}, which carry one document into the next"
    if getattr(config.get_text_config(), "type_vocab_size", None) is not None:
        return f"{name} is an encoder"
    if model_class is not None and not model_class._supports_attention_backend:
        return f"{name} computes attention in a way of its own"
    return None


def why_not_varlen(config: PretrainedConfig) -> str | None:
    """Why a model can't use varlen attention, in words; None if it can."""
    model_class, text, name = model_class_of(config), config.get_text_config(), type(config).__name__[:-6]
    if model_class is None:
        return "its code comes with the model"
    if leak := documents_leak(config):
        return leak
    kinds = set(_layer_types(config)) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{name} has layers that are not causal attention ({', '.join(sorted(kinds))})"
    if getattr(text, "is_causal", True) is False:
        return f"{name} is an encoder"
    if text.model_type in OWN_MASKS and "sliding_attention" in (_layer_types(config) or ["sliding_attention"]):
        return f"{name} says more in its masks than in its calls of attention"
    for option in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(text, option, None):
            return f"{name} uses {option}"
    return None if model_class._supports_sdpa else f"{name} computes attention in a way of its own"


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config.get_text_config(), "layer_types", None) or []


def grows_with_square(config: PretrainedConfig, attention: str) -> bool:
    """Whether documents in one row cost memory and time for every pair of their tokens."""
    return (attention != VARLEN and "flash" not in attention) or model_class_of(config) is None
