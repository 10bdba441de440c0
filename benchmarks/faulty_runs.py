"""Small real runs that benchmarks/faults.py hurts: started by scripts/train.sh, killed, resumed, compared."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measuring import ROOT
from dft.checkpoints.manifest import list_files
from examples.make_example_data import facts_en
from examples.make_tiny_model import make_model, make_tokenizer, strings

STEPS, SAVE_STEPS = 12, 4
ROWS = 40
TIMING = ("tokens_per_second", "supervised_tokens_per_second", "memory_gib")
SETTINGS = {
    "torch_dtype": "float32",
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "batching": "packed",
    "max_length": 128,
    "validation_split_percentage": 0,
    "disable_tqdm": True,
}
LAUNCHERS = ("deepspeed", "torchrun", "python")
END_SECONDS = 600  # a run that has not ended by then hangs

Result = tuple[bytes, list[dict[str, Any]]]  # the final weights, and the records of the steps


def make_inputs(place: Path) -> None:
    """Writes the model and the rows that all runs in a directory begin with."""
    make_tokenizer(strings(facts_en()[:ROWS]), vocab_size=600).save_pretrained(place / "model")
    make_model(600, hidden_size=32, num_layers=2).save_pretrained(place / "model")
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts_en()[:ROWS]))


@dataclass
class Run:
    """A run in a directory of its own.

    Args:
        place: the directory, with the model and the data beside it.
        launcher: as scripts/train.sh knows it; all but python start two processes.
        settings: flags that differ from SETTINGS, as {name: value}.
        config: of DeepSpeed, with the launcher deepspeed; empty for none.
        processes: that are started, of the launchers that start several.
    """

    place: Path
    launcher: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = "ds_config/zero3.json"
    processes: int = 2

    @property
    def out(self) -> Path:
        """Where the run writes to."""
        return self.place / "out"

    def start(self, **more: Any) -> subprocess.Popen:
        """Starts the run.

        Args:
            more: further settings.
        """
        files = {"model_name_or_path": self.place.parent / "model", "data_files": self.place.parent / "data.jsonl"}
        settings = files | SETTINGS | self.settings | {"output_dir": self.out} | more
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        config = self.config if self.launcher == "deepspeed" else ""
        env = {"LAUNCHER": self.launcher, "NPROC": str(self.processes), "DS_CONFIG": config}
        env |= {"LOG_DIR": str(self.place.parent / "logs"), "STOP_SECONDS": "120"}
        self.place.mkdir(exist_ok=True)
        with open(self._printed, "a") as output:
            command = ["bash", "scripts/train.sh", *flags]
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=output, stderr=output)

    def finish(self, **more: Any) -> int:
        """Runs to the end, and returns the exit status."""
        return self.start(**more).wait(timeout=END_SECONDS)

    @property
    def _printed(self) -> Path:
        return self.place.parent / f"{self.place.name}.txt"

    def output(self) -> str:
        """What it has printed, this time and before."""
        return self._printed.read_text(errors="replace") if self._printed.exists() else ""

    def result(self) -> Result:
        """What it ended with, without what a clock told."""
        records = [record for record in map(json.loads, self._log_lines()) if "grad_norm" in record]
        return (self.out / "model.safetensors").read_bytes(), [
            {name: value for name, value in record.items() if name not in TIMING} for record in records
        ]

    def _log_lines(self) -> list[str]:
        log = self.out / "train_log.jsonl"
        return log.read_text().splitlines() if log.exists() else []

    def steps_logged(self) -> int:
        """How many records its log has."""
        return len(self._log_lines())

    def staged_files(self, step: int) -> int:
        """How many files there are of a checkpoint that isn't finished."""
        return len(list_files(self.out / "_unfinished" / f"checkpoint-{step}"))

    def resumed(self, expected: Result) -> str:
        """Goes on from the last checkpoint, and says what came of it."""
        status = self.finish(resume_from_checkpoint="last")
        if status:
            return f"status {status}"
        return "the same" if self.result() == expected else "another result"


def wait_for(condition: Callable[[], Any], process: subprocess.Popen) -> bool:
    """Whether a condition holds before a run ends; the disk is looked at all the time, as it may hold only briefly."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


def processes_of(process: subprocess.Popen) -> list[psutil.Process]:
    """A launch script with all that it has started."""
    front = psutil.Process(process.pid)
    return [front, *front.children(recursive=True)]


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """The training processes that a launcher has started, by their ranks."""
    found = {}
    for child in processes_of(process)[1:]:
        try:
            if "train_dft.py" in child.cmdline() and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
        except psutil.Error:
            continue  # it has ended since
    launchers = {child.ppid() for child in found.values()}
    return {rank: child for rank, child in found.items() if child.pid not in launchers}


def kill_all(process: subprocess.Popen) -> None:
    """Kills a run with all its processes at once, as a power cut would."""
    processes = processes_of(process)
    for one in processes:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended since
    process.wait()
    psutil.wait_procs(processes, timeout=30)
