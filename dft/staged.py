"""A Trainer whose training has stages: their rows, their learning rates, their records and their evaluations."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from dft.batching.stages import StagedOrder, StagePlan
from dft.errors import UserError

logger = logging.getLogger(__name__)


class StagedTrainer(Trainer):
    """Trainer that takes the steps of a plan, one stage after the other.

    Args:
        stages: for the training set that `stages.training_rows` has made, with a max_steps of at most its steps; None
            for a training without stages.
    """

    def __init__(self, *args: Any, stages: StagePlan | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stages = stages
        if stages is None:
            return
        if self.args.max_steps <= 0:
            raise ValueError(f"set max_steps to the {stages.num_steps} steps of the stages, or fewer")
        check_stages_can_run(stages, self.args, self.args.max_steps)
        if _has_factors(stages) and self.lr_scheduler is not None:
            raise ValueError("give learning rate factors of stages or a scheduler of your own, which they don't reach")
        self.add_callback(StageCallback(stages))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Trainer's, multiplied by the factor of the stage that a step is in.

        Raises:
            UserError: the schedule is no function of the step.
        """
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and _has_factors(self.stages):
            if not isinstance(scheduler, LambdaLR):
                raise UserError(_why_no_factors(f"a {type(scheduler).__name__}"))
            multiply_rate(scheduler, self.stages.factor_at)
        return scheduler

    def stage_record(self, step: int) -> dict[str, int]:
        """What a record says of the stage that the last of so many steps was in."""
        return {} if self.stages is None else {"train/stage": self.stages.number_at(max(step - 1, 0))}

    def staged_order(self, dataset: Any) -> StagedOrder:
        """The order of the training rows.

        Raises:
            ValueError: the plan is of other batches.
        """
        per_step = self.get_total_train_batch_size(self.args)
        if per_step != self.stages.items_per_step:
            raise ValueError(f"the stages are planned for {self.stages.items_per_step} rows a step, not {per_step}")
        order = self.stages.order()
        if int(order.items.max()) >= len(dataset):
            raise ValueError(f"the stages are planned for more than these {len(dataset)} rows, or bins of rows")
        return order


class StageCallback(TrainerCallback):
    """Logs the start of each stage, and has the end of each recorded, and evaluated where the run evaluates."""

    def __init__(self, stages: StagePlan):
        self._stages = stages
        self._number = 0  # of the stage that was logged last

    def on_train_begin(self, args, state, control, **kwargs):
        """Has the first stage of this training logged, which may begin within one."""
        self._number = 0

    def on_step_begin(self, args, state, control, **kwargs):
        """Logs a stage at the first of its steps that this training takes."""
        number = self._stages.number_at(state.global_step)
        if number == self._number:
            return
        self._number = number
        planned = self._stages.stages[number - 1]
        logger.info(
            "Stage %d of %d, %s: steps %d to %d",
            number,
            len(self._stages.stages),
            planned.stage.name,
            planned.first_step + 1,
            planned.first_step + planned.num_steps,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """At the last step of a stage: with --logging_strategy steps, no record is of two stages."""
        planned = self._stages.stages[self._stages.number_at(state.global_step - 1) - 1]
        if state.global_step != planned.first_step + planned.num_steps:
            return
        if args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True
        ends_epoch = state.global_step == state.max_steps  # which --eval_strategy epoch evaluates itself
        by_epoch = args.eval_strategy == IntervalStrategy.EPOCH
        evaluates = args.eval_strategy == IntervalStrategy.STEPS or (by_epoch and not ends_epoch)
        done = state.epoch if by_epoch else state.global_step  # a delay is in epochs or in steps, as in transformers
        if evaluates and done >= (args.eval_delay or 0):
            control.should_evaluate = True


def multiply_rate(scheduler: LambdaLR, factor_at: Callable[[int], float]) -> None:
    """Multiplies a schedule by a factor of the step, from the step on that it is at.

    The factors are no part of its state: a run that goes on makes them anew from its stages.
    """

    def multiplied(by_step: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: by_step(step) * factor_at(step)

    scheduler.lr_lambdas = [multiplied(by_step) for by_step in scheduler.lr_lambdas]
    groups = scheduler.optimizer.param_groups
    for group, base, by_step in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * by_step(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]


def check_stages_can_run(stages: StagePlan, args: TrainingArguments, max_steps: int) -> None:
    """Checks that a training can take the steps of a plan.

    Args:
        max_steps: at which it ends.

    Raises:
        UserError: it has more steps than the plan; or the stages have learning rates, which its schedule can't take.
    """
    plugin = args.deepspeed_plugin
    if _has_factors(stages) and plugin is not None and "scheduler" in plugin.hf_ds_config.config:
        raise UserError(_why_no_factors("the scheduler in --deepspeed"))
    if _has_factors(stages) and args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        raise UserError(_why_no_factors(f"--lr_scheduler_type {args.lr_scheduler_type.value}"))
    if max_steps > stages.num_steps:
        raise UserError(
            f"--max_steps is {max_steps}, and the stages have {stages.num_steps} steps: lower it, or drop it; stages "
            "with shares of the steps, such as 30%, have as many as it says"
        )


def warn_of_early_end(stages: StagePlan, max_steps: int) -> None:
    """Warns where a training of `max_steps` steps ends before the last stage does."""
    if max_steps >= stages.num_steps:
        return
    unreached = [planned.stage.name for planned in stages.stages if planned.first_step >= max_steps]
    logger.warning(
        "The training ends after %d of the %d steps of its stages%s",
        max_steps,
        stages.num_steps,
        ", without the stages " + ", ".join(unreached) if unreached else "",
    )


def _has_factors(stages: StagePlan | None) -> bool:
    return stages is not None and any(planned.stage.learning_rate_factor != 1 for planned in stages.stages)


def _why_no_factors(schedule: str) -> str:
    return (
        f"--stages: a stage has a learning_rate_factor, which can't multiply the learning rates of {schedule}: use a "
        "schedule of --lr_scheduler_type that is a function of the step, such as cosine, or drop the factor"
    )
