"""LoRA adapters on a model, whose weights may be in 4 or 8 bits."""

import difflib
import json
import logging
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.config.adapters import AdapterConfig
from dft.config.model import ModelConfig
from dft.errors import UserError
from dft.pickles import check_model

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
INSTALL = 'pip install -e ".[adapters]"'
SHOWN_NAMES = 20  # of layers, in a message


def check_adapters(settings: AdapterConfig, model: ModelConfig, is_fsdp: bool = False) -> None:
    """Checks what can be known before the model is loaded, but after the training arguments were made.

    Args:
        is_fsdp: the model is going to be sharded by FSDP.

    Raises:
        UserError: a package is missing, the adapter isn't one, or the combination can't work.
    """
    name = model.model_name_or_path
    if is_adapter(name):
        base = json.loads((Path(name) / ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise UserError(
            f"--model_name_or_path {name} is an adapter: go on from it with --model_name_or_path {base} --adapter "
            f"{name}, or merge it first with scripts/export.py"
        )
    for package, is_needed in (("peft", settings.has_adapters), ("bitsandbytes", settings.is_quantized)):
        if is_needed and find_spec(package) is None:
            raise UserError(f"{package} is not installed, which these flags need: {INSTALL}")
    if settings.adapter and not is_adapter(settings.adapter):
        raise UserError(f"--adapter {settings.adapter}: no directory with an {ADAPTER_FILE}")
    if settings.has_adapters and model.resize_embeddings:
        raise UserError(
            "--resize_embeddings changes the model, so that an adapter wouldn't fit the original: save the resized "
            "model first, with a run of one step without adapters"
        )
    if is_fsdp and settings.load_in_8bit:
        raise UserError("--load_in_8bit: FSDP can't cut up weights in 8 bits: use --load_in_4bit True, or no --fsdp")
    is_zero3 = is_deepspeed_zero3_enabled()  # weights are sharded while they are loaded
    if is_zero3 and settings.takes_of_weights:
        raise UserError(f"--lora_init {settings.lora_init} needs whole weights, which ZeRO-3 cuts up: use ZeRO-2")
    if is_zero3 and settings.load_in_8bit:
        raise UserError("--load_in_8bit: ZeRO-3 can't cut up weights in 8 bits: use --load_in_4bit True, or ZeRO-2")


def is_adapter(directory: str) -> bool:
    """Whether it holds an adapter and no model."""
    return (Path(directory) / ADAPTER_FILE).is_file() and not (Path(directory) / "config.json").is_file()


def quantization(settings: AdapterConfig, args: TrainingArguments, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of from_pretrained that quantize the weights; none where they aren't.

    Args:
        dtype: of the weights that are not quantized.
    """
    if not settings.is_quantized:
        return {}
    # it says of every product that 8 bits are multiplied in float16
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
    computed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else dtype
    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else dtype,
        # ZeRO-3 and FSDP cut up tensors of one type; DeepSpeed, too, converts them to that in which the model computes
        bnb_4bit_quant_storage=computed if args.fsdp or args.deepspeed else dtype,
    )
    if is_deepspeed_zero3_enabled():
        return {"quantization_config": config}
    return {"quantization_config": config, "device_map": {"": args.device}}


def keep_products_exact(model: nn.Module) -> None:
    """Has layers in 4 bits multiply in evaluation as in training.

    On processors with AVX512-BF16, bitsandbytes repacks their weights at the first evaluation, for a product in
    bfloat16 that all later steps use too, and that is wrong for weights which FSDP has cut up.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def with_adapters(model: PreTrainedModel, settings: AdapterConfig, seed: int) -> "PeftModel":
    """The model with adapters, which alone are trained, and which are all that it saves.

    Args:
        seed: of the random numbers that adapters begin with; all ranks need the same.

    Raises:
        UserError: no layer has such a name, or the adapter doesn't fit the model.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if settings.adapter:
        check_model(settings.adapter)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if settings.adapter:
                adapted = PeftModel.from_pretrained(model, settings.adapter, is_trainable=True)
            else:
                adapted = get_peft_model(model, LoraConfig(**lora_arguments(settings)))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(_what_is_wrong(error, model, settings)) from error
    if settings.takes_of_weights and has_tied_head_adapted(adapted):
        raise UserError(
            f"--lora_init {settings.lora_init} would change the embedding, to which this model's head is tied: leave "
            "the head out of --lora_target_modules"
        )
    logger.info("Adapters: %s parameters are trained", share_trained(adapted))
    _save_only_adapters(adapted, is_converted=settings.takes_of_weights)
    return adapted


def has_tied_head_adapted(model: nn.Module) -> bool:
    """Whether the head is tied to the embedding and has an adapter, which the embedding has not."""
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return is_tied and hasattr(model.get_output_embeddings(), "base_layer")


def check_shardable(model: nn.Module) -> None:
    """Checks that FSDP can shard a model with adapters.

    Raises:
        UserError: the embedding or the head is trained as a copy, beside an original that both are tied by.
    """
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if is_tied and any(hasattr(end, "modules_to_save") for end in ends):
        raise UserError(
            "--lora_modules_to_save: this model's head is tied to its embedding, of which FSDP can't shard a trained "
            "copy: leave both out, or use DeepSpeed"
        )


def share_trained(model: nn.Module) -> str | None:
    """How many of a model's parameters are trained, in words; None for a model without adapters."""
    if not hasattr(model, "get_nb_trainable_parameters"):
        return None
    trained, total = model.get_nb_trainable_parameters()
    return f"{trained:,} of {total:,} ({100 * trained / total:.2f}%)"


def lora_arguments(settings: AdapterConfig) -> dict[str, Any]:
    """The arguments of peft's LoraConfig."""
    return {
        "task_type": "CAUSAL_LM",
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": settings.lora_target_modules or "all-linear",
        "modules_to_save": settings.lora_modules_to_save,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": True if settings.lora_init == "default" else settings.lora_init,
    }


def _save_only_adapters(adapted: "PeftModel", *, is_converted: bool) -> None:
    """Makes peft save neither the base model's embedding and head nor a model card of its own.

    Args:
        is_converted: the adapter has taken a part of the weights. What is saved is what has changed since, which fits
            the original weights; except in checkpoints, which training goes on from.
    """
    from peft import get_peft_model_state_dict

    save = partial(adapted.save_pretrained, save_embedding_layers=False)
    adapted.create_or_update_model_card = lambda *_: None
    adapted.save_pretrained = save
    if is_converted:
        first = {name: t.detach().cpu().clone() for name, t in get_peft_model_state_dict(adapted).items()}
        adapted.save_pretrained = partial(_save_converted, save, first)


def _save_converted(save: Any, first: dict[str, Tensor], directory: str, **kwargs: Any) -> None:
    if Path(directory).name.startswith(PREFIX_CHECKPOINT_DIR):
        save(directory, **kwargs)
        return
    with tempfile.TemporaryDirectory() as initial:  # peft reads it from there, and writes its configuration beside it
        save_file(first, Path(initial) / "adapter_model.safetensors")
        save(directory, path_initial_model_for_weight_conversion=initial, **kwargs)


def _what_is_wrong(error: Exception, model: nn.Module, settings: AdapterConfig) -> str:
    """An error of peft in words, with the nearest names of layers where a name is wrong."""
    if settings.adapter:
        return f"--adapter {settings.adapter} doesn't fit the model: {error}"
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = settings.lora_target_modules or []
    near = [match for name in wanted if name not in names for match in difflib.get_close_matches(name, names, n=2)]
    there = ", ".join(near or sorted(names)[:SHOWN_NAMES])
    return f"--lora_target_modules {' '.join(wanted)}: {error}; {'did you mean' if near else 'there are'} {there}"
