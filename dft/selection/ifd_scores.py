"""Instruction-following difficulty (IFD, Li et al., arXiv 2308.12032): how much an instruction helps with its answer.

    r(Q, A) = s(A | Q) / s(A)

s is the mean cross-entropy of the answer's tokens: s(A | Q) in the conversation, s(A) without it. Near 0 the
instruction tells all of the answer; at 1 and above it doesn't help.

The answer alone stands after what the chat template puts between any question and its answer, such as
"<|im_end|>\\n<|im_start|>assistant\\n", and nothing else. Its ids are copied from the conversation's and not tokenized
again: both passes predict the same tokens. In a conversation of several turns each answer is taken with all that
precedes it, and alone; the row's ratio is that of the sums over the tokens of all its answers, so that a long answer
counts for more than "You're welcome." An answer that no question precedes isn't counted.

Shapes: R rows, T tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dft.chat.example import Example, truncate
from dft.chat.format import ChatFormat
from dft.chat.labeler import weights_of_turns
from dft.constants import IGNORE_INDEX
from dft.errors import UserError
from dft.reading.rows import Conversation, RowError
from dft.reference.scoring import Batch, score_batch
from dft.selection.model_rows import compute_rows, shard_directory
from dft.selection.scoring_model import ScoringModel

ENCODED_AT_ONCE = 256
PROBES = ("Hi", "What is 6 x 7?")  # questions that begin and end differently
PROBE_ANSWER = "It is 42."
Row = dict[str, Any]  # input_ids and labels, int32 [T]


@dataclass(frozen=True)
class IfdScores:
    """What is known of each row, float64 [R]; NaN where it has a refusal.

    Attributes:
        ratio: s(A | Q) / s(A).
        with_instruction: s(A | Q), nats a token.
        alone: s(A), nats a token.
        tokens: of the answers, int64 [R].
        refusals: {row: why it has no score}.
    """

    ratio: np.ndarray
    with_instruction: np.ndarray
    alone: np.ndarray
    tokens: np.ndarray
    refusals: dict[int, RowError]


def ifd_scores(
    conversations: Sequence[Conversation],
    model: ScoringModel,
    *,
    max_length: int = 8192,
    tokens_at_once: int = 8192,
    cache: Path | None = None,
) -> IfdScores:
    """The scores of all conversations on every rank. All ranks must call it together.

    Args:
        max_length: longer conversations are cut on the right, as in training.
        tokens_at_once: of a batch.
        cache: for shards, see shard_directory.

    Raises:
        UserError: no row has an instruction, or the model gives numbers that aren't finite.
    """
    pairs, refusals = answer_pairs(conversations, ChatFormat(model.tokenizer), max_length)
    if not pairs:
        first = next(iter(refusals.values()), None)
        raise UserError(f"no row has an answer to an instruction, so that none has an IFD; the first: {first}")
    rows = [row for with_instruction, alone in pairs.values() for row in (with_instruction, *alone)]
    model.check_rows([row["input_ids"] for row in rows])
    lengths = np.array([len(row["input_ids"]) for row in rows])

    def nll(batch: Batch) -> np.ndarray:
        return np.array([-log_p.sum(dtype=np.float64) for log_p in score_batch(rows, batch, model.log_p)])

    seen = [np.stack([row["input_ids"], row["labels"]]) for row in rows]
    directory = shard_directory(cache, "ifd", model.directories, seen, model.settings)
    sums = compute_rows(lengths, nll, tokens_at_once, directory)
    if not np.isfinite(sums).all():
        raise UserError(f"{model.name} gives log-probabilities that aren't finite: its weights are damaged")
    return _ratios(pairs, refusals, sums, len(conversations))


def _ratios(
    pairs: dict[int, tuple[Row, list[Row]]], refusals: dict[int, RowError], sums: np.ndarray, num_rows: int
) -> IfdScores:
    """The scores from the summed cross-entropies of the rows of all pairs, float64 [passes]."""
    with_instruction, alone = np.full((2, num_rows), np.nan)
    tokens = np.zeros(num_rows, dtype=np.int64)
    start = 0
    for index, (row, parts) in pairs.items():
        end = start + 1 + len(parts)
        tokens[index] = (row["labels"] != IGNORE_INDEX).sum()
        with_instruction[index] = sums[start] / tokens[index]
        alone[index] = sums[start + 1 : end].sum() / tokens[index]
        start = end
    with np.errstate(divide="ignore", invalid="ignore"):
        # infinite for an answer that is certain without its instruction, and 1 for one that is certain in any case
        ratio = np.where(with_instruction == alone, 1.0, with_instruction / alone)
    return IfdScores(ratio, with_instruction, alone, tokens, refusals)


def answer_pairs(
    conversations: Sequence[Conversation], chat_format: ChatFormat, max_length: int
) -> tuple[dict[int, tuple[Row, list[Row]]], dict[int, RowError]]:
    """What the model is asked: {row: (the conversation, each of its answers alone)}, and why others aren't."""
    before = before_answer(chat_format)
    pairs: dict[int, tuple[Row, list[Row]]] = {}
    refusals: dict[int, RowError] = {}
    remaining = iter(enumerate(conversations))
    while chunk := list(islice(remaining, ENCODED_AT_ONCE)):
        examples = chat_format.encode_batch((row.messages, row.tools, row.template_kwargs) for _, row in chunk)
        for (index, row), example in zip(chunk, examples, strict=True):
            try:
                if isinstance(example, RowError):
                    raise example
                skipped = answers_without_question(row.messages, chat_format, len(_answers(example.labels)))
                pairs[index] = _pair(truncate(example, max_length), skipped, before)
            except RowError as error:
                refusals[index] = error
    return pairs, refusals


def before_answer(chat_format: ChatFormat) -> np.ndarray:
    """The ids that the template puts between any question and its answer, after a BOS token if it begins with one.

    Raises:
        UserError: there are none, so that nothing would predict the first token of an answer alone.
    """
    prompts = []
    for question in PROBES:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": PROBE_ANSWER}]
        try:
            example = chat_format.encode(messages)
        except RowError as error:
            raise UserError(f"the chat template doesn't take a question and its answer: {error}") from error
        prompts.append(example.input_ids[: int(np.flatnonzero(example.labels != IGNORE_INDEX)[0])])
    shortest = min(map(len, prompts))
    ends = [prompt[len(prompt) - shortest :] for prompt in prompts]
    differs = np.flatnonzero(ends[0] != ends[1])
    common = ends[0][differs[-1] + 1 if len(differs) else 0 :]
    bos = chat_format.tokenizer.bos_token_id
    has_bos = bos is not None and shortest > len(common) and prompts[0][0] == bos
    ids = np.concatenate([[bos], common]).astype(np.int32) if has_bos else common
    if len(ids) == 0:
        raise UserError("the chat template puts nothing between a question and its answer: IFD needs one that does")
    return ids


def answers_without_question(messages: list[dict[str, Any]], chat_format: ChatFormat, num_answers: int) -> int:
    """The supervised answers before the first message of a user or a tool that says anything.

    Args:
        num_answers: stretches of supervised tokens in the conversation.

    Raises:
        RowError: there is no such message, or the answers can't be told apart by their tokens.
    """
    turns = [message for message in messages if message["role"] == "assistant"]
    weights = weights_of_turns(turns, chat_format.train_on, chat_format.empty_turns)
    of_turn = iter(weights)
    count = 0
    for message in messages:
        if message["role"] == "assistant":
            count += next(of_turn) > 0
        elif message["role"] != "system" and (message["content"] or "").strip():
            break
    else:
        raise RowError("no_instruction", "no user's message stands before an answer")
    if count and num_answers != sum(weight > 0 for weight in weights):
        raise RowError("answers_not_told_apart", "an answer without a question lies beside another in its tokens")
    return count


def _answers(labels: np.ndarray) -> np.ndarray:
    """Where each stretch of supervised tokens begins and ends, int64 [answers, 2]; the first token isn't one."""
    supervised = np.concatenate([[False], labels[1:] != IGNORE_INDEX, [False]])
    return np.flatnonzero(np.diff(supervised)).reshape(-1, 2) + 1


def _pair(example: Example, skipped: int, before: np.ndarray) -> tuple[Row, list[Row]]:
    """A conversation with the labels of the answers that count, and each of these alone.

    Args:
        skipped: the first answers, which don't count.

    Raises:
        RowError: nothing counts.
    """
    answers = _answers(example.labels)[skipped:]
    if len(answers) == 0:
        raise RowError("no_instruction", "no user's message stands before an answer that is within --max_length")
    labels = np.full_like(example.labels, IGNORE_INDEX)
    alone = []
    for start, end in answers.tolist():
        labels[start:end] = example.labels[start:end]
        nothing = np.full(len(before), IGNORE_INDEX, dtype=np.int32)
        ids = example.input_ids[start:end]
        alone.append({"input_ids": np.concatenate([before, ids]), "labels": np.concatenate([nothing, ids])})
    return {"input_ids": example.input_ids, "labels": labels}, alone
