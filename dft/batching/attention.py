"""The choice of the attention implementation, and whether it keeps documents in one row apart."""

import logging

import torch
from transformers import PretrainedConfig

from dft.batching.flash_attention import FLASH_ATTENTIONS, model_class_of, newest_flash_attention
from dft.batching.varlen_attention import VARLEN, register, why_no_kernel, why_outdated
from dft.errors import UserError
from dft.model.shapes import head_sizes

logger = logging.getLogger(__name__)

# Model types that build sliding-window masks without passing the window to their attention function, which is all that
# varlen sees.
MODELS_WITH_OWN_MASKS = ("doge", "phimoe", "qwen2_moe")


def choose_attention(requested: str, config: PretrainedConfig, is_16_bit: bool, strict: bool = False) -> str:
    """Chooses the attention implementation to load a model with.

    Args:
        requested: "auto", or a name that transformers knows. "auto" is the newest FlashAttention that is installed and
            can run, else varlen where the model supports it and its fast kernel runs, else sdpa.
        is_16_bit: whether attention is computed in 16 bits.
        strict: raise an error where a FlashAttention was requested that can't run, instead of replacing it.

    Raises:
        UserError: varlen was requested for a model that can't use it, or `strict` forbids replacing a FlashAttention.
    """
    register()
    unsupported, slow = why_not_varlen(config), why_varlen_is_slow(config, is_16_bit)
    if requested == VARLEN:
        if unsupported is not None:
            raise UserError(f"--attn_implementation varlen: {unsupported}; leave it at auto")
        if slow is not None:
            logger.warning("--attn_implementation varlen goes from document to document: %s", slow)
    if requested != "auto" and requested not in FLASH_ATTENTIONS:
        return requested
    if requested != "auto" and FLASH_ATTENTIONS[requested].can_run(config, is_16_bit):
        return requested
    own = VARLEN if unsupported is None and slow is None else "sdpa"
    chosen = newest_flash_attention(config, is_16_bit) or own
    if requested != "auto":
        needs = FLASH_ATTENTIONS[requested].needs
        if strict:
            raise UserError(f"{requested} needs {needs}; drop --attn_strict to use {chosen}")
        logger.warning("%s needs %s: using %s", requested, needs, chosen)
    if chosen == "sdpa":
        reason = unsupported or slow
        # an update of PyTorch is a remedy, of which a user should hear
        level = logging.WARNING if reason == why_outdated() else logging.INFO
        logger.log(level, "Attention: sdpa, because %s", reason)
    return chosen


def why_varlen_is_slow(config: PretrainedConfig, is_16_bit: bool) -> str | None:
    """Why varlen attention would loop over documents on this machine's GPU; None if it wouldn't, or without a GPU."""
    if not torch.cuda.is_available():
        return None
    text = config.get_text_config()
    try:
        head_dim = max(head_sizes(text))
        dropout = getattr(text, "attention_dropout", 0.0) or 0.0
    except (AttributeError, RuntimeError) as error:  # RuntimeError is raised where head_dim differs by layer
        return f"the size of its heads is not known ({error})"
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    return why_no_kernel(dtype, torch.device("cuda", torch.cuda.current_device()), head_dim, dropout)


def why_documents_leak(config: PretrainedConfig) -> str | None:
    """Why documents in one row would see each other whatever the attention implementation; None if no reason is known.

    What can't be told from a configuration is found by leak_check at the first batch.
    """
    model_class, name = model_class_of(config), _model_name(config)
    kinds = {kind for kind in _layer_types(config) if kind == "linear_attention" or not kind.endswith("_attention")}
    if kinds or getattr(model_class, "_is_stateful", False):
        listed = f" ({', '.join(sorted(kinds))})" if kinds else ""
        return f"{name} has recurrent layers{listed}, which carry one document into the next"
    if getattr(config.get_text_config(), "type_vocab_size", None) is not None:
        return f"{name} is an encoder"
    if model_class is not None and not model_class._supports_attention_backend:
        return f"{name} computes attention in a way of its own"
    return None


def why_not_varlen(config: PretrainedConfig) -> str | None:
    """Why a model can't use varlen attention; None if it can.

    A model is refused where its layers rely on anything that varlen doesn't compute: masks that are not causal,
    soft-capped scores, attention within chunks.
    """
    model_class, text, name = model_class_of(config), config.get_text_config(), _model_name(config)
    if model_class is None:
        return "its code comes with the model"
    if leak := why_documents_leak(config):
        return leak
    kinds = set(_layer_types(config)) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{name} has layers that are not causal attention ({', '.join(sorted(kinds))})"
    if getattr(text, "is_causal", True) is False:
        return f"{name} is an encoder"
    if text.model_type in MODELS_WITH_OWN_MASKS and "sliding_attention" in (
        _layer_types(config) or ["sliding_attention"]
    ):
        return f"{name} says more in its masks than in its calls of attention"
    for option in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(text, option, None):
            return f"{name} uses {option}"
    return None if model_class._supports_sdpa else f"{name} computes attention in a way of its own"


def _model_name(config: PretrainedConfig) -> str:
    """The name of a model's family for messages, such as Qwen3 for a Qwen3Config."""
    return type(config).__name__[: -len("Config")]


def _layer_types(config: PretrainedConfig) -> list[str]:
    """The kind of each layer; empty for a model whose configuration doesn't list them."""
    return getattr(config.get_text_config(), "layer_types", None) or []


def is_quadratic(config: PretrainedConfig, attention: str) -> bool:
    """Whether attention takes memory and time for every pair of tokens of a row, also those of different documents.

    So does any implementation that is given a mask. Of a model with its own code nothing is known, so it is counted
    among them.
    """
    return (attention != VARLEN and "flash" not in attention) or model_class_of(config) is None
