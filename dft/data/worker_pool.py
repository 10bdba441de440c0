"""A process pool whose results come in order, with a bounded number of tasks in memory."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

TASKS_PER_WORKER = 3  # waiting or at work
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class WorkerPool:
    """Runs functions in `num_workers` forked processes, at most one per core; in this process if it is 1.

    Args:
        shared: the first argument of every function; the processes inherit it, it isn't pickled.
    """

    def __init__(self, num_workers: int, shared: Any):
        self.num_workers = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        self.shared = shared
        self._parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "WorkerPool":
        if self.num_workers > 1:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process
            fork = multiprocessing.get_context("fork")
            self._executor = ProcessPoolExecutor(self.num_workers, fork, initializer=_share, initargs=(self.shared,))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            if self._parallelism is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = self._parallelism

    def map(self, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        """(task, function(shared, *task)) for every task, in order."""
        if self._executor is None:
            for task in tasks:
                yield task, function(self.shared, *task)
            return
        waiting: deque[tuple[tuple, Future]] = deque()
        for task in tasks:
            waiting.append((task, self._executor.submit(_run, function, task)))
            if len(waiting) >= TASKS_PER_WORKER * self.num_workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


_SHARED: list[Any] = []  # one, of this worker


def _share(shared: Any) -> None:
    """The start of a worker, which ends with the process that made it, even if that is killed."""
    _SHARED.append(shared)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(function: Callable, task: tuple) -> Any:
    return function(_SHARED[0], *task)
