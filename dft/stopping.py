"""Ending a training before its end, on request, with a checkpoint: signals, a time limit, the end of the launcher.

The request of one rank is agreed on by all at the same step, in a collective that each step has anyway, FiniteCheck's.
Signals: TERM, as a cluster sends it; USR1, as SLURM sends it some minutes before a job's time is up; and INT (Ctrl+C).
"""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import psutil
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dft.errors import StoppedEarly
from dft.launched import local_rank, tell_script

logger = logging.getLogger(__name__)

STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}  # 128 and the number of TERM, of INT
TIME_IS_UP = 143
AGAIN_SECONDS = (
    1.0  # a launcher passes on a signal that its ranks got themselves; a person's second Ctrl+C comes later
)
LAUNCHERS = ("torchrun", "torch.distributed", "deepspeed", "accelerate")
LOOK_SECONDS = 2.0


class StopRequest(TrainerCallback):
    """Ends a training at the end of a step, with a checkpoint, if any rank was asked to.

    Attributes:
        agreed: the exit status that all ranks have agreed to end with; 0 while none was asked.
    """

    def __init__(self):
        self.agreed = 0
        self._asked = 0
        self._asked_at = 0.0
        self._deadline = float("inf")

    @property
    def wanted(self) -> int:
        """The exit status that this rank was asked to end with; 0 if it wasn't."""
        return self._asked or (TIME_IS_UP if time.time() >= self._deadline else 0)

    def listen(self, max_minutes: float | None = None) -> None:
        """From now on, signals are requests. Called by the program, in its main thread, before the training.

        Args:
            max_minutes: from the start of the process; None for no limit.
        """
        for number in STATUS:
            signal.signal(number, self._take)
        tell_script(f"rank-{local_rank()}", os.getpid())
        if max_minutes is not None:
            self._deadline = psutil.Process().create_time() + 60 * max_minutes

    def on_step_end(self, args, state, control, **kwargs):
        """Has Trainer save and stop, if all ranks have agreed on it."""
        if self.agreed:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def raise_if_stopped(self, state: TrainerState, output_dir: str) -> None:
        """After a training.

        Raises:
            StoppedEarly: it was ended before its last step.
        """
        if self.agreed and state.global_step < state.max_steps:
            checkpoint = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            raise StoppedEarly(
                f"Stopped on request after step {state.global_step} of {state.max_steps}. The checkpoint is "
                f"{checkpoint}; go on with --resume_from_checkpoint last",
                self.agreed,
            )

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._asked and now - self._asked_at > AGAIN_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if not self._asked:
            self._asked, self._asked_at = STATUS[signal.Signals(number)], now
            if local_rank() == 0:  # not by the logger, whose lock the interrupted code may hold
                name = signal.Signals(number).name
                os.write(2, f"{name}: a checkpoint will be saved at the end of this step\n".encode())


def end_with_launcher() -> None:
    """From now on, this process gets a TERM when a launcher that started it has ended, even if that was killed.

    Otherwise the ranks would go on without anybody to end them.
    """
    launchers = [process for process in psutil.Process().parents() if is_launcher(process)]
    if launchers:
        threading.Thread(target=_outlive_none, args=(launchers,), daemon=True).start()


def is_launcher(process: psutil.Process) -> bool:
    """Whether a process is one of Python's launchers."""
    try:
        words = process.cmdline()
    except psutil.Error:  # it has ended, or is another user's
        return False
    is_python = bool(words) and Path(words[0]).name.startswith("python")
    return is_python and any(name in word for word in words[1:4] for name in LAUNCHERS)


def _outlive_none(launchers: list[psutil.Process]) -> None:
    while all(_is_alive(process) for process in launchers):
        time.sleep(LOOK_SECONDS)
    logger.error("the launcher has ended, so this process ends, too")
    os.kill(os.getpid(), signal.SIGTERM)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
