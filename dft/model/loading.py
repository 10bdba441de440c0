"""A model's configuration and weights, loaded as the flags say."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from dft.config.adapters import AdapterConfig
from dft.config.model import ModelConfig
from dft.errors import UserError
from dft.model.adapters import check_shardable, quantization, with_adapters
from dft.model.compiled import point_to_kernels
from dft.model.fit import tokenizer_size
from dft.model.resizing import add_rows
from dft.model.tokenizer import load_tokenizer
from dft.pickles import check_model

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def load_model_tokenizer(settings: ModelConfig, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that was asked for.

    Raises:
        UserError: there is no such model, no tokenizer with it, or no such template.
    """
    name = settings.model_name_or_path
    is_hub_name = "/" not in name or (name.count("/") == 1 and not Path(name).parent.is_dir())
    if not Path(name).exists() and (name.startswith(".") or not is_hub_name):
        raise UserError(f"--model_name_or_path {name}: no such directory, and not a name on the model hub")
    return load_tokenizer(name, f"--model_name_or_path {name}", chat_template, **settings.source)


def load_config(settings: ModelConfig) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        UserError: it can't be loaded.
    """
    name = settings.model_name_or_path
    try:
        return AutoConfig.from_pretrained(name, **settings.source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name_or_path {name}: its configuration can't be loaded: {error}") from error


def computes_in_16_bits(settings: ModelConfig, args: TrainingArguments, config: PretrainedConfig) -> bool:
    """Whether the model computes in 16 bits, by autocast or because its weights have them."""
    return args.bf16 or args.fp16 or type_of(settings, config).itemsize == 2


def type_of(settings: ModelConfig, config: PretrainedConfig) -> torch.dtype:
    """The type that the weights are loaded in."""
    return (config.dtype or torch.float32) if settings.torch_dtype == "auto" else getattr(torch, settings.torch_dtype)


def load_model(
    settings: ModelConfig,
    adapters: AdapterConfig,
    args: TrainingArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    attention: str,
) -> "PreTrainedModel | PeftModel":
    """The model, sharded at once under ZeRO-3, with the adapters that are trained in its place, if any.

    Args:
        tokenizer: whose size the embedding gets where the settings ask for it.
        attention: the attention implementation, see dft.batching.attention.choose_attention.

    Raises:
        UserError: it can't be loaded.
    """
    name = settings.model_name_or_path
    check_model(name)
    if settings.trust_remote_code:
        logger.warning("Running Python code from %s, revision %s", name, settings.model_revision)
    more = quantization(adapters, args, type_of(settings, config)) | settings.source
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=settings.torch_dtype, attn_implementation=attention, **more
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"--model_name_or_path {name}: the model can't be loaded: {error}") from error
    if settings.resize_embeddings:
        add_rows(model, tokenizer_size(tokenizer))
    size = sum(map(_num_weights, model.parameters()))
    logger.info("Model: %s, %.1f M parameters, %s, %s", type(model).__name__, size / 1e6, model.dtype, attention)
    point_to_kernels(args)
    if adapters.has_adapters:
        adapted = with_adapters(model, adapters, args.seed)  # they are float32 whatever the model's type is
        if args.fsdp:
            check_shardable(adapted)
        return adapted
    keeps_copies = args.deepspeed_plugin is not None or (args.fsdp and (args.bf16 or args.fp16))
    if model.dtype != torch.float32 and not keeps_copies:
        logger.warning(
            "The weights are %s and updated as such, which loses small updates. Use --torch_dtype float32 with --bf16 "
            "True; or DeepSpeed, or --fsdp with --bf16 True, which keep float32 copies.",
            model.dtype,
        )
    return model


def _num_weights(parameter: torch.nn.Parameter) -> int:
    """The weights of a parameter, which ZeRO-3 may have sharded, and of which two are in a byte in 4 bits."""
    in_one = 2 * parameter.itemsize if type(parameter).__name__ == "Params4bit" else 1
    return getattr(parameter, "ds_numel", parameter.numel()) * in_one  # ZeRO-3 leaves numel() at 0
