"""The listing of all flags, cached so that --help and mistakes are answered without importing torch.

Most flags are fields of transformers.TrainingArguments, whose import takes seconds. flags.json holds what argparse
needs to know of every flag, with the versions and the code that it was made from. Where these differ from what is
installed, the file isn't used, and the listing is made anew in memory. After a change, write it again:

    python -m dft.config.listing
"""

import argparse
import hashlib
import json
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_origin

CACHE = Path(__file__).with_name("flags.json")
PACKAGES = ("accelerate", "torch", "transformers")  # whose versions decide which flags there are


def load_listing() -> dict[str, Any]:
    """What there is to know of the command line, from the cache where it is up to date.

    Returns:
        made_from: see `made_from`;
        groups: {title: [one entry for each argparse action]}, see `_entry`;
        trackers, compile_backends: names that --report_to and --torch_compile_backend take.
    """
    try:
        listing = json.loads(CACHE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return make_listing()
    is_current = isinstance(listing, dict) and listing.get("made_from") == made_from()
    return listing if is_current else make_listing()


def made_from() -> dict[str, str]:
    """What a listing depends on: versions without their build (2.13.0+cpu is 2.13.0), and a digest of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {name: version(name).partition("+")[0] for name in PACKAGES} | {"code": digest.hexdigest()[:32]}


def make_listing() -> dict[str, Any]:
    """The listing, from the dataclasses themselves."""
    from transformers import HfArgumentParser

    from dft.config.adapters import AdapterConfig
    from dft.config.answers import AnswersConfig
    from dft.config.data import DataConfig
    from dft.config.loss import LossConfig
    from dft.config.metrics import MetricsConfig
    from dft.config.model import ModelConfig
    from dft.config.training import COMPILE_BACKENDS, TRACKERS, DFTTrainingArguments

    groups = {}
    of_run = (ModelConfig, AdapterConfig, DataConfig, LossConfig, MetricsConfig, AnswersConfig)
    for cls in (*of_run, DFTTrainingArguments):
        parser = HfArgumentParser(cls, add_help=False)
        groups[cls._argument_group_name] = [_entry(action) for action in parser._actions]
    listing = {
        "made_from": made_from(),
        "groups": groups,
        "trackers": list(TRACKERS),
        "compile_backends": list(COMPILE_BACKENDS),
    }
    return json.loads(json.dumps(listing))  # as it is when it comes from the file


def _entry(action: argparse.Action) -> dict[str, Any]:
    """The arguments of ArgumentParser.add_argument that make an action, its `type` by name."""
    entry = {"flags": list(action.option_strings), "dest": action.dest, "help": action.help, "default": action.default}
    if isinstance(action, argparse._StoreFalseAction):
        return entry | {"action": "store_false"}
    choices = action.choices
    if isinstance(action.type, type) and issubclass(action.type, Enum):
        choices = [member.value for member in action.type]
    return entry | {
        "type": "choice" if choices is not None else _name_of_type(action.type),
        "nargs": action.nargs,
        "const": action.const,
        "choices": None if choices is None else list(choices),
        "required": action.required,
    }


def _name_of_type(kind: Any) -> str:
    if kind is dict or get_origin(kind) is dict:
        return "json"
    return kind.__name__ if kind in (str, int, float) or kind.__name__ == "string_to_bool" else "python_only"


if __name__ == "__main__":
    CACHE.write_text(json.dumps(make_listing(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
