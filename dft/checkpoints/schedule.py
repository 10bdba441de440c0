"""The learning rate of a run that goes on: that of its own flags, at the step that it goes on from."""

from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR


def follow_flags(scheduler: object, earlier: float | None, learning_rate: float) -> None:
    """Has a schedule that was loaded from a checkpoint follow the flags of this run, from the next step on.

    The loaded state holds the highest learning rate of the earlier run and its rate at the checkpoint, while the shape
    of the schedule is of this run: together they would be neither the one nor the other. Where nothing has changed,
    this changes nothing. Schedules that are no function of the step (a plateau, those of a DeepSpeed file) stay as
    they were loaded.

    Args:
        scheduler: Trainer's, which may be wrapped.
        earlier, learning_rate: the flag of the earlier run, if it is known, and that of this one.
    """
    while isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    if not isinstance(scheduler, LambdaLR):
        return
    if earlier is not None and earlier != learning_rate:
        scheduler.base_lrs = [learning_rate * (base / earlier if earlier else 1.0) for base in scheduler.base_lrs]
    groups = scheduler.optimizer.param_groups
    for group, base, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = base, base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in groups]
