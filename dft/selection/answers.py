"""Answers of a model to the instructions of rows: generated in shards, so that a run that was cut goes on.

The prompt of a row is all that stands before its last answer.

Shapes: R rows, B rows of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import logging

from dft.chat.format import ChatFormat
from dft.errors import UserError
from dft.generation import generate_answers, longest_prompt
from dft.model.fit import check_vocabulary, ids_in
from dft.model.trained import TrainedModel, load_trained
from dft.printable import printable
from dft.reading.rows import Conversation, RowError
from dft.reference.scoring import Batch
from dft.selection.model_flags import ModelFlags
from dft.selection.model_rows import compute_rows, model_directories, shard_directory
from dft.selection.scoring_model import join_ranks

NOTHING = -1  # stands behind the ids of an answer


@dataclass(frozen=True)
class Answers:
    """What a model says to the instructions of some rows.

    Attributes:
        texts: {row: its answer}.
        cut: answers that had not ended after --max_new_tokens.
        refusals: {row: why it has no answer}.
    """

    texts: dict[int, str]
    cut: int
    refusals: dict[int, RowError]


def answer_rows(
    rows: Sequence[Conversation], flags: ModelFlags, max_new_tokens: int, generated_at_once: int
) -> Answers:
    """The answers to all rows on every rank. All ranks must call it together.

    Args:
        flags: of a causal language model or an adapter.
        generated_at_once: tokens of prompts and answers of a batch.

    Raises:
        UserError: the model can't be loaded, has no row for a token, or no room for a prompt; or the device has too
            little memory.
    """
    device = join_ranks(flags.device)
    logging.disable_progress_bar()
    trained = load_trained(flags.directory, device, flags.dtype, flags.trust_remote_code)
    prompts, refusals = _prompts(rows, trained, max_new_tokens)
    ids = list(prompts.values())
    check_vocabulary(trained.model.config, trained.tokenizer, ids_in(ids), is_padded=True)
    settings = {"dtype": str(trained.model.dtype), "max_new_tokens": max_new_tokens, "ends": trained.end_tokens}
    models = model_directories(flags.directory, trained.model)
    directory = shard_directory(flags.cache_dir, "answers", models, ids, settings)
    lengths = np.array([len(prompt) + max_new_tokens for prompt in ids], dtype=np.int64)

    def compute(batch: Batch) -> np.ndarray:
        return _generate(trained, [ids[i] for i in batch], max_new_tokens, generated_at_once)

    found = compute_rows(lengths, compute, generated_at_once, directory)
    answers = [row[row != NOTHING].tolist() for row in found]
    cut = sum(answer[-1] not in trained.end_tokens for answer in answers)
    texts = {index: _text(answer, trained) for index, answer in zip(prompts, answers, strict=True)}
    return Answers(texts, cut, refusals)


def with_answer(row: Conversation, answer: str) -> Conversation:
    """The row up to its last answer, which is replaced."""
    before = row.up_to_last_answer()[:-1]
    return replace(row, messages=[*before, {"role": "assistant", "content": answer}])


def _prompts(
    rows: Sequence[Conversation], trained: TrainedModel, max_new_tokens: int
) -> tuple[dict[int, np.ndarray], dict[int, RowError]]:
    """The prompt of each row, int32 [T], and why the others have none."""
    chat_format = ChatFormat(trained.tokenizer)
    room = longest_prompt(trained.model.config, max_new_tokens)
    if room < 1:
        raise UserError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: the model takes {room + max_new_tokens} "
            "tokens with its answer; lower it"
        )
    prompts: dict[int, np.ndarray] = {}
    refusals: dict[int, RowError] = {}
    for index, row in enumerate(rows):
        try:
            prompt = chat_format.prompt(row.up_to_last_answer(), row.tools, row.template_kwargs)
        except RowError as error:
            refusals[index] = error
            continue
        if len(prompt) > room:
            detail = f"the prompt has {len(prompt)} tokens; with --max_new_tokens the model takes {room}"
            refusals[index] = RowError("prompt_too_long", detail)
        elif len(prompt) == 0:
            refusals[index] = RowError("no_instruction", "nothing stands before the answer")
        else:
            prompts[index] = prompt
    return prompts, refusals


def _generate(
    trained: TrainedModel, prompts: list[np.ndarray], max_new_tokens: int, generated_at_once: int
) -> np.ndarray:
    """The ids of each answer and NOTHING behind them, int32 [B, max_new_tokens]."""
    try:
        answers = generate_answers(
            trained.model, trained.tokenizer, prompts, max_new_tokens, generated_at_once, trained.end_tokens
        )
    except torch.OutOfMemoryError as error:
        device = printable(trained.model.device)
        raise UserError(f"{device} has no memory for {len(prompts)} answers: lower --generated_at_once") from error
    found = np.full((len(prompts), max_new_tokens), NOTHING, dtype=np.int32)
    for row, answer in zip(found, answers, strict=True):
        row[: len(answer)] = answer
    return found


def _text(answer: list[int], trained: TrainedModel) -> str:
    if answer[-1] in trained.end_tokens:
        answer = answer[:-1]
    return trained.tokenizer.decode(answer, skip_special_tokens=True)
