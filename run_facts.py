"""What a run was: its settings, data, versions and code, kept in run.json."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def about_run(settings: dict[str, dict[str, Any]], args: TrainingArguments, report: dict[str, Any]) -> dict[str, Any]:
    """A run's settings by group (model, data, dft), its rows by data file, versions, the code's commit, the command.

    Args:
        args: what else there is to know of them stands in training_args.json.
        report: see data_report.make_report.
    """
    packages = ("torch", "transformers", "accelerate", "deepspeed", "datasets")
    return {
        **settings,
        "training": {"bf16": args.bf16, "fp16": args.fp16, "world_size": args.world_size},
        "data_rows": {entry["path"]: entry["kept"] for entry in report["files"]},
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "command_line": shlex.join(sys.argv),
    }


def _git_commit() -> str | None:
    """The commit of the code; None where it is not in a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run(about: dict[str, Any], directory: Path) -> None:
    """Writes run.json, from which scripts/evaluate.py takes its settings."""
    (directory / "run.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_run(model: Path) -> dict[str, Any]:
    """What run.json says in a model's directory, or beside a checkpoint; {} where there is none."""
    for path in (model / "run.json", model.resolve().parent / "run.json"):
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}
