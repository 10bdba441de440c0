"""A Trainer whose rows get log-probabilities by the weights that its training begins with."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from dft.errors import UserError
from dft.loss.scorer import Scorer
from dft.loss.token_weight import TokenWeight
from dft.reference.column import ReferenceColumn
from dft.reference.rows import CollatorWithColumn, rows_to_fill, with_reference


class ReferenceTrainer(Trainer):
    """Trainer that can add a column reference_log_p to its training and evaluation rows, before the first step.

    The model itself gives it, so that no second one is in memory: adapters included, which change nothing before they
    are trained.
    """

    scorer: Scorer
    _reference: ReferenceColumn | None = None

    def add_reference_column(self, cache_dir: str | None) -> None:
        """Has the rows of all sets get the column, but for those that come with one.

        Args:
            cache_dir: see ReferenceColumn.

        Raises:
            ValueError: a set has no length.
        """
        self.train_dataset = with_reference(self.train_dataset)
        self.eval_dataset = with_reference(self.eval_dataset)
        self.data_collator = CollatorWithColumn(self.data_collator)
        is_16_bit = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.float16, torch.bfloat16)
        self._reference = ReferenceColumn(self.args.output_dir, cache_dir, is_16_bit)
        self.add_callback(_ScoreAtStart(self))

    def train(self, resume_from_checkpoint: str | None = None, *args, **kwargs):
        """Trainer's; the column is found before a checkpoint takes the place of the starting weights.

        CheckpointTrainer, which comes before this class, has found out which checkpoint it is.

        Raises:
            UserError: it is not there, and the starting weights neither.
        """
        if self._reference is not None and resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            self._reference.find(self._sets(), self.model, checkpoint)
            if self._is_sharded():
                self._reference.check_found(self._sets(), checkpoint)
            else:
                self._score(self.model.to(self.args.device), self._sets())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        """Trainer's; before a training, the weights as they are count as those that it begins with.

        Raises:
            UserError: they are sharded, so that only a training can call the model.
        """
        if self._reference is not None and eval_dataset is None and not self.is_in_train:
            if self._is_sharded() and rows_to_fill(self.eval_dataset):
                raise UserError("sharded weights can't score rows outside a training: evaluate on one process")
            self._score(self.model.to(self.args.device), {"evaluation rows": self.eval_dataset})
        return super().evaluate(eval_dataset, *args, **kwargs)

    def score_by_starting_weights(self) -> None:
        """Fills in the column where it is missing, by the weights as they are. All ranks must call it together."""
        self._score(self.model_wrapped, self._sets())

    def _score(self, model: nn.Module, sets: dict[str, Any]) -> None:
        """Fills in the column of these sets where it is missing; the model may be wrapped."""
        was_training = model.training
        model.eval()
        try:
            score = partial(self._log_p, model)
            self._reference.compute(sets, self.model, score, self._train_batch_size)
        finally:
            model.train(was_training)

    def _log_p(self, model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
        """log p of the supervised tokens of some rows, row by row, [N]."""
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        inputs = dict(self._prepare_inputs(self.data_collator(rows)))
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            _, tokens, _ = self.scorer.score(model, inputs, labels, TokenWeight(0.0))
        return -tokens.nll

    def _sets(self) -> dict[str, Any]:
        return {"training rows": self.train_dataset, "evaluation rows": self.eval_dataset}

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())


class _ScoreAtStart(TrainerCallback):
    """Has the rows scored when a training begins, and the model is wrapped."""

    def __init__(self, trainer: ReferenceTrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Does nothing in a training that is resumed, whose rows have been filled in before."""
        self._trainer.score_by_starting_weights()
