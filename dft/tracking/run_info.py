"""What a run was: its settings, data, versions and code, kept in run.json."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dft.errors import UserError


def about_run(
    settings: dict[str, dict[str, Any]], args: TrainingArguments, report: dict[str, Any], num_rows: dict[str, int]
) -> dict[str, Any]:
    """A run's settings by group (model, data, dft, logging), its rows, versions, the code's commit, the command line.

    Args:
        args: what else there is to know of them stands in training_args.json.
        report: see data_report.make_report.
        num_rows: that are trained and evaluated on.
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


def without_secrets(argv: list[str]) -> list[str]:
    """A command line without the values of flags such as --hub_token."""
    words, is_secret = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        names_secret = name.startswith("--") and name.replace("-", "_").endswith(("_token", "_key"))
        words.append("HIDDEN" if is_secret else f"{name}=HIDDEN" if names_secret and equals else word)
        is_secret = names_secret and not equals
    return words


def _git_commit() -> str | None:
    """The commit of the code, and whether it was changed since; None where git doesn't know the code."""
    here = Path(__file__)
    commands = (
        ["ls-files", "--error-unmatch", here.name],  # in another repository's directory it is not
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
    """Writes run.json, from which scripts/evaluate.py takes its settings."""
    (directory / "run.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_run(model: Path) -> dict[str, Any]:
    """What run.json says in a model's directory, or beside a checkpoint; {} where there is none.

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
