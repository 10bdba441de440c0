"""Run metadata saved to run.json: settings, data, versions, code and command line."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from dft.errors import UserError
from dft.files import dispensable
from dft.secrets import without_secrets

if TYPE_CHECKING:
    from dft.config.command_line import Settings
    from dft.data.prepared import PreparedData


def describe_run(settings: "Settings", data: "PreparedData") -> dict[str, Any]:
    """Collects a run's metadata, see about_run; rank 0 writes it to run.json in the output directory."""
    groups = {"model": settings.model, "adapters": settings.adapters, "data": settings.data}
    groups |= {"dft": settings.loss, "logging": settings.metrics, "answers": settings.answers}
    num_rows = {"training": len(data.train), "evaluation": data.num_evaluation}
    about = about_run(
        {name: asdict(group) for name, group in groups.items()}, settings.training, data.report, num_rows
    )
    if settings.training.process_index == 0:
        write_run(about, Path(settings.training.output_dir))
    return about


def about_run(
    settings: dict[str, dict[str, Any]], args: TrainingArguments, report: dict[str, Any], num_rows: dict[str, int]
) -> dict[str, Any]:
    """Collects a run's metadata: settings by group, numbers of rows, package versions, commit, command line.

    Args:
        settings: the groups model, adapters, data, dft, logging and answers, as dictionaries.
        args: of which only precision and world size are taken; training_args.json has the others.
        report: see dft.data.report.make_report.
        num_rows: rows that are trained on and evaluated on.
    """
    packages = ("torch", "transformers", "accelerate", "deepspeed", "datasets")
    return {
        **settings,
        "training": {"bf16": args.bf16, "fp16": args.fp16, "world_size": args.world_size},
        "num_rows": num_rows,
        "data_rows": {entry["path"]: entry["kept"] for entry in report["files"]},
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "command_line": shlex.join(without_secrets(sys.argv)),
    }


def _git_commit() -> str | None:
    """The commit of the code, ending in -dirty if it was changed since; None if git doesn't track the code."""
    here = Path(__file__)
    commands = (
        ["ls-files", "--error-unmatch", here.name],  # fails where it is installed inside another repository
        ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
    )
    try:
        for command in commands:
            command = ["git", "-C", str(here.parent), *command]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.strip()


def write_run(about: dict[str, Any], directory: Path) -> None:
    """Writes run.json to a directory; scripts/evaluate.py reads the settings of the training from it."""
    path = directory / "run.json"
    with dispensable(path):
        path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_run(model: Path) -> dict[str, Any]:
    """Reads the run.json in a model's directory, or beside a checkpoint; {} if there is none.

    Raises:
        UserError: it can't be read.
    """
    for path in (model / "run.json", model.resolve().parent / "run.json"):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(run, dict):
                raise ValueError("not a JSON object")
            return run
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read ({error}): mend it, or move it away") from error
    return {}
