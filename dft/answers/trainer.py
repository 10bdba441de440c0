"""A Trainer that asks the model at each evaluation, and adds the scores of its answers to the metrics."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from dft.answers.asking import Answer, answer_metrics, ask
from dft.answers.questions import Question
from dft.generation import TOKENS_AT_ONCE
from dft.model.trained import find_end_tokens


@dataclass(frozen=True)
class AnswerPlan:
    """What is asked at each evaluation.

    Attributes:
        max_new_tokens: of an answer.
        tokens_at_once: of prompts and answers of a batch; None for what per_device_eval_batch_size of the longest
            take.
    """

    questions: list[Question]
    max_new_tokens: int
    tokens_at_once: int | None = None


class AnsweringTrainer(Trainer):
    """Trainer whose evaluations ask the model, if there is anything to ask.

    Args:
        answers: what is asked; None for nothing. The tokenizer is taken from processing_class.

    Attributes:
        answers: of the last evaluation, on every rank.

    Raises:
        ValueError: questions are given, and no tokenizer.
    """

    def __init__(self, *args: Any, answers: AnswerPlan | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.answers: list[Answer] = []
        self._asks = answers
        self._end_tokens: list[int] = []
        if answers is not None:
            if self.processing_class is None:
                raise ValueError("answers need the tokenizer: give it as processing_class")
            self._end_tokens = find_end_tokens(self.model, self.processing_class)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's; the questions are asked in evaluations of the evaluation set as a whole."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._asks is not None and description == "Evaluation" and metric_key_prefix == "eval":
            self.answers = self._ask(self._asks)
            output.metrics.update({f"eval_{key}": value for key, value in answer_metrics(self.answers).items()})
        return output

    def _ask(self, plan: AnswerPlan) -> list[Answer]:
        longest = max(len(question.prompt) for question in plan.questions) + plan.max_new_tokens
        at_once = plan.tokens_at_once or min(TOKENS_AT_ONCE, self.args.per_device_eval_batch_size * longest)
        is_sharded = (self.is_deepspeed_enabled and is_deepspeed_zero3_enabled()) or self.is_fsdp_enabled
        # layers that are compiled for training would be compiled again for each length of the cache
        not_compiled = torch.compiler.set_stance("force_eager") if self.args.torch_compile else nullcontext()
        with self.compute_loss_context_manager(), not_compiled:
            return ask(
                self.model,
                self.processing_class,
                plan.questions,
                plan.max_new_tokens,
                self._end_tokens,
                tokens_at_once=at_once,
                device=self.args.device,
                in_step=is_sharded and dist.is_initialized() and dist.get_world_size() > 1,
            )
