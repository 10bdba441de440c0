"""The frame of every command-line program: exit status, one message for a user's mistake, a clean end.

Imports neither torch nor transformers, which take seconds, so that --help and mistakes are answered at once.
"""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

from dft.errors import RankLost, SharedUserError, StoppedEarly, UserError
from dft.lasting_stream import outlive_readers
from dft.launched import local_rank, spans_nodes, tell_script
from dft.printable import printable

USER_ERROR_STATUS = 2
ERROR_GRACE_SECONDS = 30.0  # the other ranks of a node wait this long before they print the message themselves


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes: the process group's, else the launcher's, else 0 of 1."""
    dist = _process_group()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _process_group() -> ModuleType | None:
    """The module torch.distributed if this process has joined a group, without importing it; else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def quiet_imports() -> None:
    """Silences what libraries would say while they are imported, and nobody can act on.

    On some processors bitsandbytes asks for a package with a kernel for inference, which is never used here.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextmanager
def program() -> Iterator[None]:
    """Runs a whole program: turns a UserError into one message, leaves the process group, and ends the process.

    A UserError ends the program with status 2, and the first rank of each node prints its message on stderr. A
    launcher kills all ranks of a node as soon as one has ended, so the others wait for the first to end; they print
    the message themselves only if nothing has killed them by then. The ranks of other nodes are told, so that they
    don't wait for this one. Other exceptions pass through; before the training, other nodes are told of them too.
    Nothing that follows in the file is run. A StoppedEarly is printed by the first rank of each node, and ends the
    program with its status. A RankLost is printed like it, and ends the program with status 1. A program goes on where
    nobody reads its output any more.
    """
    status = 0
    quiet_imports()
    outlive_readers()
    try:
        yield
    except UserError as error:
        _print_error(error)
        status = USER_ERROR_STATUS
    except RankLost as lost:
        print(printable(f"error: {lost}", lines=True), file=sys.stderr, flush=True)
        end_process(1)  # in the process group, because leaving it would wait for the rank that is lost
    except StoppedEarly as stopped:
        if local_rank() == 0:
            print(printable(str(stopped), lines=True), file=sys.stderr, flush=True)
        status = stopped.status
    except Exception as error:
        if not _is_awaited():
            raise
        sys.excepthook(type(error), error, error.__traceback__)  # before the others have come, which may take minutes
        _tell_failure(f"{type(error).__name__}: {error}\nThe traceback is in the output of that node.")
        status = 1
    dist = _process_group()
    if dist is not None:
        dist.destroy_process_group()
    end_process(status)


def _print_error(error: UserError) -> None:
    is_first = local_rank() == 0
    message = printable(f"error: {error}", lines=True)
    if is_first:
        print(message, file=sys.stderr, flush=True)
    if not isinstance(error, SharedUserError) and _is_awaited():
        remark = _tell_failure(str(error))
        if is_first and remark:
            print(printable(remark, lines=True), file=sys.stderr, flush=True)
    if not is_first:
        time.sleep(ERROR_GRACE_SECONDS)
        print(message, file=sys.stderr, flush=True)


def _is_awaited() -> bool:
    """Whether processes of other nodes would wait for this one, if it ended without a word."""
    if not spans_nodes():
        return False
    from dft.distributed import others_listen  # imports torch

    return others_listen()


def _tell_failure(message: str) -> str:
    from dft.distributed import tell_failure  # imports torch

    return tell_failure(message)


def _note_status(status: int) -> None:
    """Tells scripts/train.sh the exit status, because some launchers end with another one than their ranks."""
    if local_rank() == 0:
        tell_script("status", status)


def end_process(status: int) -> NoReturn:
    """Ends the process as the interpreter would, but without finalizing the interpreter.

    A library's thread (gloo's, autograd's) that asks for the interpreter's lock during finalization aborts the
    process, so that now and then a run that has done all its work would end as failed.
    """
    _note_status(status)
    threading._shutdown()  # waits for other threads, as the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
