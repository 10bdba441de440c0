"""The quickstart in one process, without its installation: seconds of each of its steps, and the numbers it ends with.

It runs scripts/quickstart.sh as it stands, but for the line that sets up an environment, which needs a network. With
--tiny both trainings take two steps, the main one does without DeepSpeed, and the answer is short.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Part, run
from benchmarks.measuring import ROOT

SCRIPT = ROOT / "scripts" / "quickstart.sh"
SETUP = re.compile(r'(?m)^here=.*\nsource "\$here/setup\.sh"$')
CONFIG = re.compile(r"--config examples/\w+\.yaml")
QUESTION = '"$question"'
TINY = " --max_steps 2 --logging_steps 1 --eval_steps 2 --save_steps 2"
HEADING = re.compile(r"^== (\d)/3 ")
ANSWER = "The capital of France is Paris."
LOGGED = ("ce_loss", "train/avg_p_correct", "eval_ce_loss", "eval_acc", "grad_norm")


def script(is_tiny: bool) -> str:
    """The text of the quickstart, without its installation.

    Raises:
        ValueError: it isn't written as this expects.
    """
    text, removed = SETUP.subn("", SCRIPT.read_text(encoding="utf-8"))
    short, configs = CONFIG.subn(lambda found: found[0] + TINY, text)
    short = short.replace(QUESTION, f"{QUESTION} --max_new_tokens 4")
    if removed != 1 or configs != 2:
        raise ValueError(f"{SCRIPT.name}: {removed} places set up an environment, {configs} name a configuration")
    return short if is_tiny else text


def environment(part: Part) -> dict[str, str]:
    """One process; `python` is this interpreter, also where only python3 is on the path."""
    out = part.out
    links = out / "bin"
    links.mkdir(exist_ok=True)
    (links / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (links / "python").chmod(0o755)
    path = f"{links}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "OUT": str(out / "quickstart"), "NPROC": "1"}
    return os.environ | own | ({"LAUNCHER": "python"} if part.tiny else {})


def records(directory: Path) -> list[dict[str, Any]]:
    """What a training has logged."""
    path = directory / "train_log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def first_and_last(logged: list[dict[str, Any]]) -> dict[str, float]:
    """The first and the last value of what is worth a look."""
    result = {}
    for name in LOGGED:
        values = [record[name] for record in logged if name in record]
        if values:
            result |= {f"{name}_first": values[0], f"{name}_last": values[-1]}
    result["steps"] = max((record.get("step", 0) for record in logged), default=0)
    return result


def measure(part: Part) -> None:
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", script(part.tiny)],
        cwd=ROOT,
        env=environment(part),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    began: dict[str, float] = {}
    is_right = False
    for line in process.stdout:
        print(line, end="", flush=True)
        is_right = is_right or line.strip() == ANSWER
        if heading := HEADING.match(line):
            began[heading[1]] = time.monotonic() - start
            part.add("began", began)
            if logged := records(part.out / "quickstart" / "base"):
                part.add("base", first_and_last(logged))
    if process.wait() != 0:
        raise RuntimeError(f"the quickstart ended with status {process.returncode}, see the log")
    part.headline(seconds=time.monotonic() - start)
    model = first_and_last(records(part.out / "quickstart" / "model"))
    part.add("model", model | {"answer_is_right": is_right})
    part.headline(**{name: model[name] for name in ("ce_loss_last", "eval_acc_last") if name in model})
    if not part.tiny and not is_right:
        raise RuntimeError(f"the answer is not: {ANSWER}")


if __name__ == "__main__":
    run("quickstart", measure)
