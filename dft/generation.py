"""Answers to many prompts at once: greedy search in batches, padded on the left, with a cache of keys and values.

An answer depends on its prompt alone, up to rounding: not on what shares its batch, nor on what the model's own
generation config says of sampling, beams and penalties. Only the tokens that end an answer are taken from there.

Shapes: B prompts of a batch, T tokens of the longest.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dft.errors import UserError
from dft.model.trained import find_end_tokens
from dft.reference.scoring import plan_scoring

TOKENS_AT_ONCE = 32768  # of prompts and answers, for which the cache holds keys and values


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokens_at_once: int = TOKENS_AT_ONCE,
    end_tokens: Sequence[int] | None = None,
) -> list[list[int]]:
    """The likeliest next tokens, one after the other, behind each prompt; the last one is an end token unless cut.

    Args:
        model: or a PeftModel. It is asked in evaluation mode, and left in the mode that it was in.
        prompts: ids of each prompt, with the generation prompt of the chat template: see ChatFormat.prompt.
        max_new_tokens: of an answer, at least 1.
        tokens_at_once: of prompts and answers of a batch, with padding; a longer prompt is a batch of its own.
        end_tokens: ids that end an answer; None for those of find_end_tokens.

    Raises:
        UserError: a prompt and an answer of max_new_tokens are longer than what the model takes.
        ValueError: a prompt is empty.
    """
    if max_new_tokens < 1 or not all(map(len, prompts)):
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1, and no prompt may be empty")
    longest, room = max(map(len, prompts), default=0), longest_prompt(model, max_new_tokens)
    if longest > room:
        raise UserError(
            f"the longest prompt has {longest} tokens; with an answer of {max_new_tokens} the model takes prompts of "
            f"{room}: leave longer ones out, or allow fewer new tokens"
        )
    ends = list(find_end_tokens(model, tokenizer) if end_tokens is None else end_tokens)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    # greedy search with a cache, which are the defaults
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad)
    answers: list[list[int]] = [[]] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        lengths = np.array([len(prompt) + max_new_tokens for prompt in prompts])
        with _without_own_config(model):
            for batch in plan_scoring(lengths, tokens_at_once):
                found = _generate(model, [prompts[i] for i in batch], pad, config)
                for index, ids in zip(batch, found.tolist(), strict=True):
                    answers[index] = _until_end(ids, ends)
    finally:
        model.train(was_training)
    return answers


def longest_prompt(model: PreTrainedModel, max_new_tokens: int) -> int:
    """The tokens of the longest prompt that leaves the model positions for an answer of max_new_tokens."""
    context = model.config.get_text_config().to_dict().get("max_position_embeddings") or sys.maxsize
    return context - max_new_tokens


@contextmanager
def _without_own_config(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's own generation config, from which all that isn't given would be taken."""
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]  # peft passes its on
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config


def _generate(model: PreTrainedModel, prompts: list[Sequence[int]], pad: int, config: GenerationConfig) -> Tensor:
    """What follows each prompt, int64 [B, at most max_new_tokens]; anything stands behind the first end token."""
    ids, mask = (tensor.to(model.device) for tensor in _padded(prompts, pad))
    found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return found[:, ids.shape[1] :]


def _padded(prompts: list[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 [B, T], padded on the left: the next token comes behind the last column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """An answer up to its first end token, with it."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]
