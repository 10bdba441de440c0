"""Guard a run against its trackers: one that fails while training is dropped with a warning."""

import logging
from functools import partialmethod
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

logger = logging.getLogger(__name__)


class GuardedTracker(TrainerCallback):
    """Wraps a tracker's callback so that its failure ends the tracking, with a warning, and not the run.

    Attributes:
        callback: the wrapped callback; None once it has failed.
    """

    def __init__(self, callback: TrainerCallback):
        self.callback: TrainerCallback | None = callback
        self.name = type(callback).__name__.removesuffix("Callback")

    def call(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Passes an event of the training on to the tracker, and returns what it returns; None if it failed."""
        if self.callback is None:
            return None
        try:
            return getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:  # trackers raise errors of many kinds, and none may end a training run
            logger.warning("%s failed and is dropped, the run goes on: %s: %s", self.name, type(error).__name__, error)
            self.callback = None
            return None


# Trainer calls a method for each event. All of them are made here, so that none is missed that transformers may add.
for _event in (name for name in vars(TrainerCallback) if name.startswith("on_")):
    setattr(GuardedTracker, _event, partialmethod(GuardedTracker.call, _event))


def guard_trackers(trainer: Trainer) -> None:
    """Wraps all trackers among a trainer's callbacks in GuardedTracker."""
    handler, trackers = trainer.callback_handler, tuple(INTEGRATION_TO_CALLBACK.values())
    handler.callbacks = [GuardedTracker(c) if isinstance(c, trackers) else c for c in handler.callbacks]
