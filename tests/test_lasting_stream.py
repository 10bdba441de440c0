"""A program outlives whoever reads its output."""

import io
import logging
import os
import subprocess
import sys

import pytest

from dft.lasting_stream import LastingStream
from tests.helpers import FULL, ROOT, TIMEOUT, environment_of, needs_full_disk

PROGRAM = """
import sys
from dft.program import program
with program():
    for i in range(3):
        print("a line", flush=True)
    print("done", file=sys.stderr)
"""


@pytest.fixture
def unread() -> int:
    """The end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("kind", ["pipe", pytest.param("disk", marks=needs_full_disk)])
def test_what_cannot_be_written_is_dropped_with_one_warning(kind, unread, caplog):
    number = unread if kind == "pipe" else os.open(FULL, os.O_WRONLY)
    with caplog.at_level(logging.WARNING, "dft"), LastingStream(io.FileIO(number, "w"), write_through=True) as stream:
        for _ in range(3):
            assert stream.write("a line\n") == len("a line\n")
            stream.flush()
        os.write(number, b"of a library")
    (record,) = caplog.records
    assert {"pipe": "Broken pipe", "disk": "No space left on device"}[kind] in record.message


def test_a_program_goes_on_when_nobody_reads_what_it_prints(unread):
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(
        command, stdout=unread, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment_of(), timeout=TIMEOUT
    )
    os.close(unread)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "done"
