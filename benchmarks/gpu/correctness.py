"""The tests that need a GPU: how many pass, fail and are skipped, and the names of those that fail."""

import os
import re
import subprocess
import sys

from benchmarks.gpu.part import Part, Skipped, run
from benchmarks.measuring import ROOT, installed

TESTS = "tests/cuda"
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
OF_WORKER = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S+::.*?)\s*$")
REASON = re.compile(r"^SKIPPED \[\d+\] \S+ (.*)$")
COUNTED = {"PASSED": "passed", "XFAIL": "passed", "SKIPPED": "skipped"}  # everything else counts as failed
AT_ONCE = 8  # tests that start programs
NO_TESTS = 5  # the exit status of pytest that found none


class Counts:
    """What the tests of one or more runs of pytest ended with."""

    def __init__(self, part: Part):
        self.part = part
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []
        self.reasons: set[str] = set()

    def read(self, line: str) -> None:
        """Counts the test of a line of pytest's output, if there is one."""
        line = OF_WORKER.sub(r"\2 \1", line)
        if found := OUTCOME.match(line):
            name, outcome = found.groups()
            self.outcomes[COUNTED.get(outcome, "failed")] += 1
            if outcome not in COUNTED:
                self.failures.append(name)
            self.part.add("tests", self.outcomes | {"failures": self.failures})
            self.part.headline(**self.outcomes)
        elif found := REASON.match(line):
            self.reasons.add(found[1])


def run_tests(marks: str, counts: Counts) -> int:
    """Runs the tests with these marks, and returns the exit status of pytest.

    Those that start programs run side by side if pytest-xdist is there: they wait for imports most of the time.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:randomly", "-p", "no:cacheprovider"]
    if "not launch" not in marks and installed("pytest-xdist"):
        command += ["-n", str(AT_ONCE)]
    process = subprocess.Popen(
        [*command, "-m", marks, TESTS],
        cwd=ROOT,
        env=os.environ | {"DFT_TEST_DEVICE": "cuda"},  # without, the tests hide the GPU
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        counts.read(line)
    return process.wait()


def measure(part: Part) -> None:
    if not (ROOT / TESTS).is_dir():
        raise Skipped(f"there is no {TESTS}")
    counts = Counts(part)
    # those that start programs come last, because they take the longest
    marks = ("cuda",) if part.tiny else ("cuda and not launch", "cuda and launch")
    statuses = {run_tests(mark, counts) for mark in marks}
    if len(statuses) > 1:
        statuses -= {0, NO_TESTS}
    judge(part, max(statuses, default=0), counts.outcomes, sorted(counts.reasons))


def judge(part: Part, status: int, counts: dict[str, int], reasons: list[str]) -> None:
    """Ends the part as skipped if nothing was tested, and as failed if a test or pytest itself failed."""
    part.add("skip_reasons", reasons)
    if status == NO_TESTS:
        raise Skipped(f"{TESTS} has no test with the mark cuda")
    if status != 0:
        raise RuntimeError(f"pytest ended with status {status}, {counts['failed']} tests failed")
    if counts["passed"] == 0:
        raise Skipped("; ".join(reasons) or "no test ran")


if __name__ == "__main__":
    run("correctness", measure)
