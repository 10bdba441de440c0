"""What the flags' dataclasses are written with, and suggestions for unknown names."""

import difflib
from collections.abc import Iterable
from dataclasses import field, fields, replace
from typing import Any, TypeVar

T = TypeVar("T")


def option(help: str, default: Any = None, aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass field that becomes a command-line flag.

    Args:
        help: one or two sentences, with the unit.
        aliases: other spellings on the command line, with their dashes.
    """
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


def required(help: str, aliases: tuple[str, ...] = ()) -> Any:
    """As `option`, for a flag that must be given."""
    return field(metadata={"help": help, "aliases": list(aliases)})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def override(config: T, keywords: dict[str, Any]) -> T:
    """A copy of a configuration with the settings among some keyword arguments, which are taken out of these."""
    own = {f.name for f in fields(config)} & keywords.keys()
    return replace(config, **{name: keywords.pop(name) for name in own})
