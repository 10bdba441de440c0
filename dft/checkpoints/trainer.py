"""A Trainer whose checkpoints can be relied on: whole or absent, the best and the newest stay, resuming compares."""

import copy
import hashlib
import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from dft.batching.stages import StagePlan
from dft.checkpoints.best import restore_best, tell_what_is_compared
from dft.checkpoints.compare import check_loadable, compare_facts, read_facts
from dft.checkpoints.facts import run_facts
from dft.checkpoints.finite_weights import check_finite
from dft.checkpoints.integrity import check_whole
from dft.checkpoints.manifest import replace_file
from dft.checkpoints.resume import find_newest
from dft.checkpoints.schedule import follow_flags
from dft.checkpoints.serving import (
    add_end_of_turn,
    save_generation_config,
    share_tied_weights,
    weights_put_back,
    with_cache,
)
from dft.checkpoints.staging import StagedSave, rotate
from dft.checkpoints.universal import complete_optimizer, is_universal, loaded_as_saved
from dft.config.loss import LossConfig
from dft.config.training import DFTTrainingArguments
from dft.distributed import once_per_node
from dft.parallel.agreement import versions
from dft.pickles import check_checkpoint
from dft.reference.rows import ReferenceRows

EVALUATED_APART = (SaveStrategy.STEPS, SaveStrategy.EPOCH)  # saves that don't depend on an evaluation


class CheckpointTrainer(Trainer):
    """Trainer with the checkpoints of DFTTrainer.

    Trainer's, accelerate's and DeepSpeed's own writers write them, to a directory beside their place, which a
    checkpoint gets when it is whole. The best and the newest checkpoint are kept whatever save_total_limit is. Only an
    evaluation of weights that are saved can be the best: that of others could neither be kept nor loaded.

    Args:
        made_with: what checkpoints are said to be made with, see facts.run_facts. Whoever gives it has compared it
            with the checkpoint that is resumed. By default it is found and compared by the trainer.
    """

    loss_config: LossConfig
    stages: StagePlan | None = None

    def __init__(self, *args, made_with: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._given_facts = self._facts = made_with
        self._saved_step: int | None = None
        self._evaluated: tuple[int | None, dict[str, float]] = (None, {})  # the step, and its metrics
        self._has_end_token = False
        self._save_in_progress: StagedSave | None = None
        self._last_size: int | None = None  # bytes of the last checkpoint, see StagedSave.publish

    # ---- resuming -------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trainer's; a checkpoint's files are checked, and what it was made with is compared, before it is loaded.

        True stands for the newest checkpoint that is whole.

        Differences are refused, unless resume_anyway is set; with plain TrainingArguments, which don't have it, they
        are a warning.

        Raises:
            UserError: a file is cut or damaged, or the checkpoint was made with other data or settings.
            FloatingPointError: weights are NaN or infinite, before a save or at the end.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = str(once_per_node(partial(find_newest, Path(self.args.output_dir))))
        if self._given_facts is None and (checkpoint or self.args.save_strategy != SaveStrategy.NO):
            self._facts = once_per_node(self._find_facts)
            if checkpoint:
                if resume_from_checkpoint is not True:  # find_newest has looked at it
                    once_per_node(partial(_check_files, Path(checkpoint)))
                once_per_node(partial(check_loadable, Path(checkpoint), self.args))
                goes_on = self.args.resume_anyway if isinstance(self.args, DFTTrainingArguments) else True
                compare_facts(checkpoint, self._facts, go_on=goes_on)
        result = super().train(checkpoint, *args, **kwargs)
        check_finite(self.model, self.state.global_step)
        return result

    def _find_facts(self) -> dict[str, Any]:
        rows = self.train_dataset
        rows = rows.rows if isinstance(rows, ReferenceRows) else rows
        has_columns = isinstance(rows, Dataset) and {"input_ids", "labels"} <= set(rows.column_names)
        rows = rows if has_columns else None
        return run_facts(self.args, self.loss_config, self.model.config, rows, stages=self.stages)

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

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Trainer's, which has DeepSpeed load the checkpoint that is resumed."""
        with loaded_as_saved(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Trainer's, for a checkpoint in any format."""
        with loaded_as_saved(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Says nothing of a weight that is tied to another: a checkpoint holds both once, under the other's name."""
        if isinstance(self.model, PreTrainedModel):
            missing = [key for key in load_result.missing_keys if key not in self.model.all_tied_weights_keys]
            load_result = load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; the learning rate follows the arguments of this training."""
        if is_universal(checkpoint):
            complete_optimizer(self.deepspeed.optimizer.optimizer, Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            then, _ = read_facts(Path(checkpoint))
            follow_flags(self.lr_scheduler, then.get("learning_rate"), self.args.learning_rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; a process that the checkpoint has no random state of gets one of its own."""
        rank = self.args.process_index
        name = f"rng_state_{rank}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is not None and not (Path(checkpoint) / name).is_file():
            seed = f"{self.args.seed} {self.state.global_step} {rank}"
            set_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4]))
            return
        super()._load_rng_state(checkpoint)

    def _run_epoch(self, *args, **kwargs):
        """Trainer's, which would train a step more where the checkpoint is at the end of the training."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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
        """Trainer's, staged; with an evaluation of the same step that came before the save."""
        step, metrics = self._evaluated
        if step == self.state.global_step and self.args.save_strategy in EVALUATED_APART:
            super()._determine_best_metric(metrics, trial)
        check_finite(self.model, self.state.global_step)
        final = self._checkpoint_directory(trial)
        save = StagedSave(final.parent, final.name)
        save.begin(self._least_bytes())
        self._save_in_progress = save
        try:
            self.save_more(save.staged)
            super()._save_checkpoint(model, trial)
            self._name_best(save)
            self._last_size = save.publish(self._about_checkpoint())
        except Exception as error:
            save.give_up()
            free = shutil.disk_usage(final.parent).free / 2**30
            error.add_note(
                f"{final} could not be saved; {free:.2f} GiB are free there. Earlier ones are as they were."
            )
            raise
        finally:
            self._save_in_progress = None
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(final.parent, self.args.save_total_limit, [final, *([] if best is None else [Path(best)])])

    def save_more(self, checkpoint: Path) -> None:
        """Writes what a subclass adds to a checkpoint, which is a directory. All ranks call it together."""

    def _get_output_dir(self, trial) -> str:
        """Trainer's; during a save, the directory that the checkpoint is written in."""
        save = self._save_in_progress
        return super()._get_output_dir(trial) if save is None else str(save.staged.parent)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer's, when the checkpoint has its place."""
        if self._save_in_progress is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _least_bytes(self) -> int:
        """What this rank will write at least: what it did last time, or its weights and optimizer."""
        if self._last_size is not None:
            return self._last_size
        size = 0
        if self.args.should_save:
            size = get_model_param_count(self.model, trainable_only=True) * self.model.dtype.itemsize
        if not self.args.save_only_model and (self.args.should_save or self.is_deepspeed_enabled):
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            size += sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
        return size

    def _about_checkpoint(self) -> dict[str, Any]:
        return {"step": self.state.global_step, "made_with": self._facts, "versions": versions()}

    def _name_best(self, save: StagedSave) -> None:
        """Gives the best checkpoint, if it is the one that is being saved, the name that it will have."""
        if self.state.best_model_checkpoint == str(save.staged):
            self.state.best_model_checkpoint = str(save.final)
            if self.args.should_save:
                self.state.save_to_json(str(save.staged / TRAINER_STATE_NAME))

    def _mark_saved_as_best(self, checkpoint: Path) -> None:
        """Notes that the newest checkpoint is the best, which was saved before it was evaluated."""
        self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            text = json.dumps(asdict(self.state), indent=2, sort_keys=True) + "\n"  # as Trainer writes it
            replace_file(checkpoint, TRAINER_STATE_NAME, text)

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


def _check_files(checkpoint: Path) -> None:
    """Raises UserError where files aren't as they were written, or would run code."""
    check_whole(checkpoint)
    check_checkpoint(checkpoint)
