"""Two runs never write to one output directory; the lock of a run that was killed doesn't stop the next."""

import multiprocessing
import os
import signal
import socket

import pytest

from dft.errors import UserError
from dft.files import LOCK, take_directory


def hold(directory, has_taken) -> None:
    take_directory(directory, "--output_dir")
    has_taken.set()
    signal.pause()


@pytest.fixture
def other_run(tmp_path):
    """A process that has taken the directory."""
    fork = multiprocessing.get_context("fork")
    has_taken = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, has_taken), daemon=True)
    process.start()
    assert has_taken.wait(timeout=60)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_told_of_the_first(other_run, tmp_path):
    with pytest.raises(UserError, match=f"process {other_run.pid} on {socket.gethostname()}: give another directory"):
        take_directory(tmp_path, "--output_dir")


def test_a_run_that_was_killed_stops_nobody(other_run, tmp_path):
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.join()
    assert (tmp_path / LOCK).exists()
    take_directory(tmp_path, "--output_dir")
