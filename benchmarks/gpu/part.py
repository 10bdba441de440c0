"""What the parts of a GPU run share: a result file that grows, and worker processes that may die.

A part is a module with a function `measure(part)` that ends in `run("name", measure)`. Its result is OUT/NAME.json:

    {"part": …, "status": "running" | "done" | "skipped" | "failed", "reason": …, "seconds": …,
     "headline": {name: number or reason}, "measurements": {name: numbers or reason}}

The file is written again after every measurement, so that a part that fails or is cut leaves the earlier ones whole.
A reason begins with "skipped: " or "failed: ".
"""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

NO_CUDA = "skipped: no CUDA"
MARK = "RESULT "  # begins a line of a worker that holds a result, among all that libraries print
LAST_SECONDS = 5.0  # nothing is started when a part has less time than this left
DEVICE_LOST = 77  # status of a worker that has reported an error after which CUDA answers nothing any more
MAX_FRUITLESS = 3  # workers in a row without a result, after which no more are started


class Skipped(Exception):
    """A part or a measurement can't be made here; the message says why."""


class Part:
    """A part of the run, and its result file.

    Args:
        out: directory of the results.
        seconds: how long the part may take.
        tiny: whether sizes are those of a test on the processor.
    """

    def __init__(self, name: str, out: Path, seconds: float, tiny: bool):
        self.out, self.tiny, self.seconds = out, tiny, seconds
        self._start = time.monotonic()
        self._path = out / f"{name}.json"
        self.result: dict[str, Any] = {"part": name, "status": "running", "reason": ""}
        self.result |= {"seconds": 0.0, "headline": {}, "measurements": {}}
        self.write()

    @property
    def measurements(self) -> dict[str, Any]:
        return self.result["measurements"]

    def time_left(self) -> float:
        """Seconds until the part is cut."""
        return self.seconds - (time.monotonic() - self._start)

    def add(self, name: str, value: Any) -> None:
        """Keeps a measurement: numbers, or the reason why there are none."""
        self.measurements[name] = value
        print(f"{name}: {json.dumps(finite(value))}", flush=True)
        self.write()

    def headline(self, **values: float | str) -> None:
        """Keeps what the last line of the run says of this part."""
        self.result["headline"] |= values
        self.write()

    def end(self, status: str, reason: str = "") -> None:
        self.result |= {"status": status, "reason": reason}
        self.write()

    def write(self) -> None:
        """Replaces the file, which is whole at any time."""
        self.result["seconds"] = round(time.monotonic() - self._start, 1)
        write_json(self._path, self.result)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file at once, so that nobody sees a half of it."""
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(whole, path)


def finite(value: Any) -> Any:
    """The same with NaN and infinity as text, because JSON doesn't know them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def run(name: str, measure: Callable[[Part], None]) -> None:
    """Runs a part from its command line; its exit status is 1 if it fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    part = Part(name, args.out.resolve(), args.seconds, args.tiny)
    try:
        if not (args.tiny or has_cuda()):
            raise Skipped("no CUDA; with --tiny it runs on the processor")
        measure(part)
    except Skipped as reason:
        part.end("skipped", f"skipped: {reason}")
    except Exception as error:
        traceback.print_exc()
        part.end("failed", failure(error))
        raise SystemExit(1) from error
    else:
        part.end("done")


def has_cuda() -> bool:
    """Whether there is a GPU. Imports torch, which most parts leave to their workers."""
    import torch

    return torch.cuda.is_available()


def failure(error: BaseException) -> str:
    """An exception as the reason why there is no number."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def numbers(measurement: Any) -> dict[str, Any]:
    """The numbers of a measurement; none if it is missing or a reason."""
    return measurement if isinstance(measurement, dict) else {}


def reason_of(measurement: Any) -> str:
    """Why a measurement has no numbers."""
    return measurement if isinstance(measurement, str) else "skipped: not measured"


# ---- workers ------------------------------------------------------------------------------------


def serve(items: Iterable[str], measure: Callable[[str], dict[str, Any]]) -> None:
    """In a worker: measures one item after the other and prints each result.

    After an error of the device the process ends, because CUDA answers nothing any more.
    """
    for item in items:
        is_lost = False
        try:
            result: dict[str, Any] | str = measure(item)
        except Skipped as reason:
            result = f"skipped: {reason}"
        except Exception as error:  # whatever it is, it is the result of this item, and the next one is measured
            traceback.print_exc()
            result, is_lost = failure(error), "CUDA error" in str(error)
        print(MARK + json.dumps([item, finite(result)]), flush=True)
        if is_lost:
            raise SystemExit(DEVICE_LOST)


def results_of(part: Part, module: str, items: list[str], item_seconds: float) -> Iterator[tuple[str, Any]]:
    """Every item with its result, from worker processes; one that dies or hangs costs the item it was at.

    Args:
        module: of the worker, which gets the items as arguments.
        item_seconds: how long a worker may take for one item, imports included.
    """
    waiting = list(items)
    fruitless = 0  # workers in a row without any result
    while waiting:
        if part.time_left() < LAST_SECONDS or fruitless == MAX_FRUITLESS:
            reason = "failed: no worker could start" if fruitless == MAX_FRUITLESS else "skipped: no time left"
            yield from ((item, reason) for item in waiting)
            return
        before = len(waiting)
        tiny = ["--tiny"] if part.tiny else []
        command = [sys.executable, "-m", module, *tiny, *waiting]
        status = yield from _worker_results(command, waiting, item_seconds, part)
        fruitless = 0 if len(waiting) < before else fruitless + 1
        if waiting and status != DEVICE_LOST and part.time_left() >= LAST_SECONDS:
            reason = f"its process ended with status {status}, or took more than {item_seconds:.0f} s; see the log"
            yield waiting.pop(0), f"failed: {reason}"


def _worker_results(
    command: list[str], waiting: list[str], item_seconds: float, part: Part
) -> Generator[tuple[str, Any], None, int]:
    """The results of one worker, and its status when it ends, or took too long for one item and was killed.

    Args:
        waiting: the items of the command, of which those are removed that have a result.
    """
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    watch = _killer(worker, min(item_seconds, part.time_left() - LAST_SECONDS / 2))
    for line in worker.stdout:
        if not line.startswith(MARK):
            print(line, end="", flush=True)
            continue
        watch.cancel()
        item, result = json.loads(line.removeprefix(MARK))
        waiting.remove(item)
        yield item, result
        watch = _killer(worker, min(item_seconds, part.time_left() - LAST_SECONDS / 2))
    watch.cancel()
    return worker.wait()


def _killer(worker: subprocess.Popen, seconds: float) -> threading.Timer:
    """Kills a worker after so many seconds, unless it is canceled before."""
    timer = threading.Timer(max(seconds, 0.0), worker.kill)
    timer.daemon = True
    timer.start()
    return timer
