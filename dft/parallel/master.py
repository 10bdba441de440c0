"""Wait for the master before the launcher starts, with words instead of the launcher's traces.

    python -m dft.parallel.master ADDRESS PORT

Ends with status 0 as soon as the port answers, and with status 2 and a message if it doesn't.
"""

import socket
import sys
import time

from dft.errors import UserError
from dft.program import program

UNREACHABLE_SECONDS = 90.0  # a network that is about to come up does so in this time
NOT_STARTED_SECONDS = 900.0  # nodes may be started by hand, one after the other
ATTEMPT_SECONDS = 5.0
PAUSE_SECONDS = 2.0


def wait_for_master(
    address: str, port: int, *, unreachable: float = UNREACHABLE_SECONDS, not_started: float = NOT_STARTED_SECONDS
) -> None:
    """Returns when the master's port answers.

    A host that refuses the connection is there, and its launcher may still be started. One that doesn't answer, or
    whose name is unknown, is waited for less long.

    Args:
        unreachable, not_started: seconds to wait in these two cases.

    Raises:
        UserError: the host can't be reached, or nothing listens on the port.
    """
    began, was_there = time.monotonic(), None
    while True:
        try:
            socket.create_connection((address, port), timeout=ATTEMPT_SECONDS).close()
            return
        except ConnectionRefusedError:
            is_there, reason = True, "connection refused"
        except OSError as error:
            is_there, reason = False, str(error.strerror or error)
        limit = not_started if is_there else unreachable
        if is_there != was_there:  # also a host that comes up, and then takes its time to start
            print(f"Waiting up to {limit:.0f} s for the master {address}:{port} ({reason})", flush=True)
            began, was_there = time.monotonic(), is_there
        waited = time.monotonic() - began
        if waited > limit:
            raise UserError(_message(address, port, is_there, reason, waited))
        time.sleep(min(PAUSE_SECONDS, limit))


def _message(address: str, port: int, is_there: bool, reason: str, waited: float) -> str:
    where = f"the master MASTER_ADDR={address} MASTER_PORT={port}"
    if is_there:
        return (
            f"{where} has not started after {waited:.0f} s: the host is there, but nothing listens on the port "
            f"({reason}). Start node 0 (NODE_RANK=0) with the same MASTER_PORT, or see why it has ended"
        )
    return (
        f"{where} can't be reached after {waited:.0f} s ({reason}). MASTER_ADDR must be the name or address of node 0 "
        "as this node knows it, and no firewall may block the port; test it with: ping " + address
    )


def command() -> None:
    """The command line of this module."""
    with program():
        wait_for_master(sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    command()
