"""The frame of every command-line program: exit status, one message for a user's mistake, a clean end."""

import atexit
import os
import sys
import threading
import time
from contextlib import contextmanager
from typing import NoReturn

from dft.errors import UserError

USER_ERROR_STATUS = 2
ERROR_GRACE_SECONDS = 30.0  # other ranks wait so long for rank 0's message


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes: the process group's, else the launcher's, else 0 of 1."""
    dist = sys.modules.get("torch.distributed")  # not imported here: it takes seconds
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def program():
    """Around a whole program: leaves the process group at its end, and makes a UserError its one message.

    A UserError ends the program with status 2 and is printed on stderr by rank 0. Other ranks wait for that: a
    launcher ends all of them when one has ended, so that the first to end must be the one that says why. Only
    where nobody ends them do they say it themselves. Other exceptions pass.
    The process ends here: nothing that follows is run.
    """
    status = 0
    try:
        yield
    except UserError as error:
        if rank_and_world_size()[0] > 0:
            time.sleep(ERROR_GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = USER_ERROR_STATUS
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    end_process(status)


def end_process(status: int) -> NoReturn:
    """Ends the process as the interpreter would, but for taking itself apart.

    A thread of a library (gloo's, autograd's) that asks for the interpreter's lock while it is taken
    apart aborts the process: now and then, a run that has done all its work would end as failed.
    """
    threading._shutdown()  # waits for threads, as at any end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
