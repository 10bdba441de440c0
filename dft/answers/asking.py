"""Ask a model the questions, on all ranks together, and count what is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dft.answers.questions import Question
from dft.errors import UserError
from dft.generation import TOKENS_AT_ONCE, share_answers
from dft.printable import printable

AVERAGES = ("score", "ended", "mean_tokens")


@dataclass(frozen=True)
class Answer:
    """What a model answers to a question.

    Attributes:
        text: without the token that ended it.
        num_tokens: with that token.
        has_ended: by an end token, before the limit.
        is_right: by the question's scorer.
    """

    question: Question
    text: str
    num_tokens: int
    has_ended: bool
    is_right: bool


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    end_tokens: Sequence[int],
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    device: torch.device | None = None,
    in_step: bool = False,
) -> list[Answer]:
    """The likeliest answers, in the order of the questions, on every rank. All ranks must call it together.

    Args:
        end_tokens, tokens_at_once, device, in_step: see dft.generation.share_answers.

    Raises:
        UserError: a prompt with its answer is longer than what the model takes.
    """
    prompts = [question.prompt for question in questions]
    found = share_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        end_tokens,
        tokens_at_once=tokens_at_once,
        device=device,
        in_step=in_step,
    )
    return [_answer(question, ids, tokenizer, end_tokens) for question, ids in zip(questions, found, strict=True)]


def _answer(
    question: Question, ids: list[int], tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int]
) -> Answer:
    has_ended = ids[-1] in end_tokens
    # special tokens stay: they may be the tags of a thinking block or of a tool call
    text = tokenizer.decode(ids[:-1] if has_ended else ids, skip_special_tokens=False)
    is_right = question.scorer.is_right(question.thinking + text, question.reference)
    return Answer(question, text, len(ids), has_ended, is_right)


# ---- numbers ------------------------------------------------------------------------------------


def groups_of(answers: Sequence[Answer]) -> dict[tuple[str, str], list[Answer]]:
    """The answers of each (source, scorer), sorted by them."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.question.source, answer.question.scorer.name), []).append(answer)
    return dict(sorted(groups.items()))


def averages_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Shares of right and of ended answers, and mean tokens: {score, ended, mean_tokens}."""
    columns = zip(*((answer.is_right, answer.has_ended, answer.num_tokens) for answer in answers), strict=True)
    return {name: sum(column) / len(column) for name, column in zip(AVERAGES, columns, strict=True)}


def answer_metrics(answers: Sequence[Answer]) -> dict[str, float]:
    """The averages over all answers, and the score of each source by each of its scorers."""
    metrics = {f"answers/{name}": value for name, value in averages_of(answers).items()}
    for group, some in groups_of(answers).items():
        metrics[metric_of(*group)] = averages_of(some)["score"]
    return metrics


def metric_of(source: str, scorer: str) -> str:
    """The name of the score of a source; that of regex without its pattern, which may hold anything."""
    return f"answers/{source}/{scorer.partition(':')[0]}"


def check_metric(metric: str | None, questions: Sequence[Question]) -> None:
    """Raises UserError where a metric of answers decides over checkpoints, and it isn't one of these questions'."""
    name = (metric or "").removeprefix("eval_")
    if not name.startswith("answers/") or name in {f"answers/{name}" for name in AVERAGES}:
        return
    known = sorted({metric_of(question.source, question.scorer.name) for question in questions})
    if name not in known:
        listed = ", ".join(f"eval_{printable(name)}" for name in ("answers/score", *known))
        raise UserError(f"--metric_for_best_model is {printable(metric)}; of answers there are {listed}")


def record_of(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An answer as a JSON object, with the whole prompt as text."""
    question = answer.question
    return {
        "source": question.source,
        "place": question.place,
        "prompt": tokenizer.decode(question.prompt.tolist(), skip_special_tokens=False),
        "asked": question.asked,
        "reference": question.reference,
        "answer": answer.text,
        "scorer": question.scorer.name,
        "is_right": answer.is_right,
        "has_ended": answer.has_ended,
        "tokens": answer.num_tokens,
    }
