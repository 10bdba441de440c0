"""What a saved model needs to be served: the token that ends its answers, and a cache."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.model.trained import turn_end_token

logger = logging.getLogger(__name__)


def add_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Adds the token that turns were trained to end with to those that the model's generation config stops at.

    That of a base model is often <|endoftext|> alone, and generate() would go on after the answer. The token is that
    of the tokenizer's chat template; without one, nothing is known of turns.

    Args:
        model: a model or a PeftModel.
        tokenizer: or whatever else processes the data, or None.
    """
    generation_config = getattr(model, "generation_config", None)
    has_template = isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.chat_template
    if generation_config is None or not has_template:
        return
    try:
        end = turn_end_token(ChatFormat(tokenizer))
    except UserError as error:  # the rows weren't made by this template
        logger.info("The saved model gets no end-of-turn token: %s", error)
        return
    own = generation_config.eos_token_id
    stops_at = [] if own is None else list(dict.fromkeys(own)) if isinstance(own, list) else [own]
    if end is None:
        logger.warning(
            "The chat template ends an assistant turn with no special token, so the trained model stops only at %s. "
            "Give --chat_template a template that ends turns with a token of its own",
            tokenizer.convert_ids_to_tokens(stops_at) or "nothing",
        )
    elif end not in stops_at:
        generation_config.eos_token_id = [*stops_at, end] if stops_at else end
        logger.info(
            "Saved models stop at %s, which ends a turn here, besides %s: generation_config.json says so",
            tokenizer.convert_ids_to_tokens(end),
            tokenizer.convert_ids_to_tokens(stops_at) or "nothing",
        )


def save_generation_config(model: Any, directory: str) -> None:
    """Writes the generation config of an adapter's base model, which peft doesn't, beside the adapter."""
    generation_config = getattr(model, "generation_config", None)
    if generation_config is None:
        return
    try:
        generation_config.save_pretrained(directory)
    except ValueError as error:  # transformers refuses to save values that its loading has accepted
        logger.warning("%s gets no generation_config.json, the base model's isn't valid: %s", directory, error)


def share_tied_weights(state_dict: dict[str, Tensor], model: Any) -> None:
    """Makes tied weights one tensor again, so that they are written once.

    accelerate gathers the weights of DeepSpeed and FSDP one by one, as copies.
    """
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name in state_dict and source in state_dict and torch.equal(state_dict[name], state_dict[source]):
            state_dict[name] = state_dict[source]


@contextmanager
def with_cache(model: Any) -> Iterator[None]:
    """Inside, the model's configurations ask for a cache, without which every new token would cost a whole pass."""
    configs = [model.config, model.config.get_text_config()]
    if getattr(model, "generation_config", None) is not None:
        configs.append(model.generation_config)
    without = [config for config in configs if getattr(config, "use_cache", None) is False]
    for config in without:
        config.use_cache = True
    try:
        yield
    finally:
        for config in without:
            config.use_cache = False


@contextmanager
def weights_put_back(model: nn.Module) -> Iterator[None]:
    """Puts the parameters and buffers back that are of another type or elsewhere afterwards.

    An evaluation with --bf16_full_eval or --fp16_full_eval converts the weights, and what is trained or saved after it
    would be rounded to 16 bits.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, data in parameters:
            if parameter.dtype != data.dtype or parameter.device != data.device:
                parameter.data = data
        for module, earlier in buffers:
            for name, buffer in earlier.items():
                now = module._buffers.get(name)
                if now is not None and buffer is not None and (now.dtype, now.device) != (buffer.dtype, buffer.device):
                    module._buffers[name] = buffer
