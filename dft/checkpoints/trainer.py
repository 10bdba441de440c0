"""A Trainer whose checkpoints can be relied on: the best and the newest stay, and resuming compares."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, get_last_checkpoint

from dft.checkpoints.best import restore_best, tell_what_is_compared
from dft.checkpoints.facts import compare_facts, run_facts, write_facts
from dft.checkpoints.integrity import check_whole
from dft.checkpoints.serving import (
    add_end_of_turn,
    save_generation_config,
    share_tied_weights,
    weights_put_back,
    with_cache,
)
from dft.config.loss import LossConfig
from dft.config.training import DFTTrainingArguments
from dft.distributed import once_per_node
from dft.pickles import check_checkpoint
from dft.reference.rows import ReferenceRows

EVALUATED_APART = (SaveStrategy.STEPS, SaveStrategy.EPOCH)  # saves that don't depend on an evaluation


class CheckpointTrainer(Trainer):
    """Trainer with the checkpoints of DFTTrainer.

    The best and the newest checkpoint are kept whatever save_total_limit is. Only an evaluation of weights that are
    saved can be the best: that of others could neither be kept nor loaded.

    Args:
        made_with: what checkpoints are said to be made with, see facts.run_facts. Whoever gives it has compared it
            with the checkpoint that is resumed. By default it is found and compared by the trainer.
    """

    loss_config: LossConfig

    def __init__(self, *args, made_with: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._given_facts = self._facts = made_with
        self._saved_step: int | None = None
        self._evaluated: tuple[int | None, dict[str, float]] = (None, {})  # the step, and its metrics
        self._has_end_token = False

    # ---- resuming -------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trainer's; a checkpoint's files are checked, and what it was made with is compared, before it is loaded.

        Differences are refused, unless resume_anyway is set; with plain TrainingArguments, which don't have it, they
        are a warning.

        Raises:
            UserError: a file is cut or damaged, or the checkpoint was made with other data or settings.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if self._given_facts is None and (checkpoint or self.args.save_strategy != SaveStrategy.NO):
            self._facts = once_per_node(self._find_facts)
            if checkpoint:
                once_per_node(partial(check_whole, Path(checkpoint)))
                once_per_node(partial(check_checkpoint, Path(checkpoint)))
                goes_on = self.args.resume_anyway if isinstance(self.args, DFTTrainingArguments) else True
                compare_facts(checkpoint, self._facts, go_on=goes_on)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _find_facts(self) -> dict[str, Any]:
        rows = self.train_dataset
        rows = rows.rows if isinstance(rows, ReferenceRows) else rows
        has_columns = isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names)
        return run_facts(self.args, self.loss_config, self.model.config, rows if has_columns else None)

    def _inner_training_loop(self, *args, **kwargs):
        """Trainer's; nothing of an earlier training is taken for one of this."""
        self._saved_step, self._evaluated = None, (None, {})
        return super()._inner_training_loop(*args, **kwargs)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """Trainer's; the best checkpoint is looked for anew when a training is resumed."""
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            restore_best(self.state, self.args, Path(resume_from_checkpoint).parent)
        tell_what_is_compared(self.args, self.state)
        return position

    # ---- the best and the newest ----------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Trainer's, for weights that are saved: at this evaluation, or at this step before it."""
        step = self.state.global_step
        self._evaluated = (step, metrics)
        if self.args.save_strategy in EVALUATED_APART and not self.control.should_save and self._saved_step != step:
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self._saved_step == step:
            self._mark_saved_as_best(self._checkpoint_directory(trial))
        return is_best

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's, with made_with.json, and with an evaluation of the same step that came before the save."""
        step, metrics = self._evaluated
        if step == self.state.global_step and self.args.save_strategy in EVALUATED_APART:
            super()._determine_best_metric(metrics, trial)
        if self.args.should_save and self._facts is not None:
            write_facts(self._facts, self._checkpoint_directory(trial))
        super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step

    def _mark_saved_as_best(self, checkpoint: Path) -> None:
        """Notes that the newest checkpoint is the best, which was saved before it was evaluated."""
        self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            unfinished = checkpoint / "trainer_state.unfinished"
            self.state.save_to_json(str(unfinished))
            os.replace(unfinished, checkpoint / "trainer_state.json")

    def _checkpoint_directory(self, trial) -> Path:
        return Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _finalize_training(self, *args, **kwargs):
        """Trainer's, which would delete the newest checkpoint where save_total_limit is 1 and it isn't the best."""
        given = self.args
        self.args = copy.copy(given)
        self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args = given

    # ---- what is saved --------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, ready to be served; an adapter gets a generation config of its own."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self._has_end_token:
            add_end_of_turn(model, self.processing_class)
            self._has_end_token = True
        if state_dict is not None:
            share_tied_weights(state_dict, model)
        with with_cache(model):
            super()._save(output_dir, state_dict)
            if self.args.should_save:  # nothing reads the pickled arguments, and loading a pickle runs code
                (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)
            if self.args.should_save and not isinstance(model, PreTrainedModel):
                save_generation_config(model, output_dir or self.args.output_dir)

    def evaluation_loop(self, *args, **kwargs):
        """Trainer's; outside training it may convert the weights, which are put back."""
        if self.is_in_train or not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            return super().evaluation_loop(*args, **kwargs)
        with weights_put_back(self.model):
            return super().evaluation_loop(*args, **kwargs)
