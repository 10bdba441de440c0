"""Answers to many prompts at once: greedy search in batches, padded on the left, with a cache of keys and values.

An answer depends on its prompt alone, up to rounding: not on what shares its batch, nor on what the model's own
generation config says of sampling, beams and penalties. Only the tokens that end an answer are taken from there.

Shapes: B prompts of a batch, T tokens of the longest.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dft.distributed import gather_in_training
from dft.errors import UserError
from dft.model.trained import find_end_tokens
from dft.reference.scoring import Batch, plan_scoring

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
    ends = list(find_end_tokens(model, tokenizer) if end_tokens is None else end_tokens)
    generator = Generator(model, max_new_tokens, ends, _pad_token(tokenizer, ends))
    generator.check(prompts)
    found = generator.generate_all(prompts, generator.plan(prompts, range(len(prompts)), tokens_at_once))
    return [found[index] for index in range(len(prompts))]


def share_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_tokens: Sequence[int],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    device: torch.device | None = None,
    in_step: bool = False,
) -> list[list[int]]:
    """As generate_answers, on every rank: each generates a share of the answers. All ranks must call it together.

    Args:
        device: that the model computes on; by default that of its weights.
        in_step: all ranks make the same number of calls of the model, as sharded weights need it, each of whose calls
            is a collective.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    generator = Generator(model, max_new_tokens, list(end_tokens), _pad_token(tokenizer, end_tokens), device, in_step)
    generator.check(prompts)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
    # with sharded weights, a rank without a prompt of its own answers one that another rank answers too
    shares = [order[start::world] or order[:1] for start in range(world)]
    plans = [generator.plan(prompts, share, tokens_at_once) for share in shares]
    mine = plans[rank]
    if in_step and prompts:
        mine = mine + mine[-1:] * (max(map(len, plans)) - len(mine))
    found = generator.generate_all(prompts, mine)
    of_prompt = {index: answer for part in reversed(gather_in_training(found)) for index, answer in part.items()}
    return [of_prompt[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class Generator:
    """A model, and how it is asked.

    Attributes:
        ends: ids that end an answer.
        pad: the id that batches are padded with.
        device, in_step: see share_answers.
    """

    model: PreTrainedModel
    max_new_tokens: int
    ends: list[int]
    pad: int
    device: torch.device | None = None
    in_step: bool = False

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError or ValueError where the prompts can't be asked, see generate_answers."""
        if self.max_new_tokens < 1 or not all(map(len, prompts)):
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1, and no prompt may be empty")
        longest, room = max(map(len, prompts), default=0), longest_prompt(self.model.config, self.max_new_tokens)
        if longest > room:
            raise UserError(
                f"the longest prompt has {longest} tokens; with an answer of {self.max_new_tokens} the model takes "
                f"prompts of {room}: leave longer ones out, or allow fewer new tokens"
            )

    def plan(self, prompts: Sequence[Sequence[int]], share: Sequence[int], tokens_at_once: int) -> list[Batch]:
        """Some of the prompts in batches; `share` holds their indices, and so do the batches."""
        lengths = np.array([len(prompts[index]) + self.max_new_tokens for index in share])
        return [[share[place] for place in batch] for batch in plan_scoring(lengths, tokens_at_once)]

    def generate_all(self, prompts: Sequence[Sequence[int]], plan: list[Batch]) -> dict[int, list[int]]:
        """The answers to the prompts of a plan, by their indices."""
        found: dict[int, list[int]] = {}
        with _asked(self.model):
            for batch in plan:
                found.update(zip(batch, self.generate([prompts[index] for index in batch]), strict=True))
        return found

    def generate(self, prompts: list[Sequence[int]]) -> list[list[int]]:
        """The answers to the prompts of a batch."""
        # greedy search with a cache, which are the defaults
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=self.ends or None, pad_token_id=self.pad
        )
        device = self.model.device if self.device is None else self.device
        ids, mask = (tensor.to(device) for tensor in _padded(prompts, self.pad))
        found = self.model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=self.in_step
        )
        return [_until_end(answer, self.ends) for answer in found[:, ids.shape[1] :].tolist()]


def longest_prompt(config: PretrainedConfig, max_new_tokens: int) -> int:
    """The tokens of the longest prompt that leaves a model positions for an answer of max_new_tokens."""
    context = config.get_text_config().to_dict().get("max_position_embeddings") or sys.maxsize
    return context - max_new_tokens


def _pad_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    return next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)


@contextmanager
def _asked(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and without its own generation config; afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        with _without_own_config(model):
            yield
    finally:
        model.train(was_training)


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
