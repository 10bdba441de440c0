"""The stages of a training, from a YAML file: which sources each stage draws from, for how long, and how fast.

- name: special
  sources: {tools_en: 1, reasoning_en: 1}
  steps: 40%
- name: general
  sources: {facts_en: 1, tools_en: 1/8}
  steps: 60%
  learning_rate_factor: 0.5
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import yaml

from dft.config.yaml_nodes import mapping_of, place_of, read_yaml, refuse_unknown, text_of
from dft.errors import UserError
from dft.printable import printable

KEYS = ("name", "sources", "steps", "epochs", "max_length", "learning_rate_factor")
NUMBER = re.compile(r"[+-]?(\d{1,12}(\.\d{0,12})?|\.\d{1,12})(/\d{1,12})?")
EVERYTHING = "*"  # the source that is all rows
MAX_NAME = 64  # characters
TOLERANCE = Fraction(1, 10)  # percent that shares may miss 100 by: 33.3% three times


@dataclass(frozen=True)
class Stage:
    """One stage, as it is written.

    Args:
        sources: {source: value}; of each row in a pass, how often it is drawn; with `has_shares`, what share of a
            pass is of the source, and they add up to 1.
        steps: share of the steps of the training, above 0; None for a stage in epochs.
        epochs: passes over the rows of the stage, above 0; None for a stage in steps.
        max_length: longer rows, in tokens, aren't drawn; None for no limit.
        place: FILE:LINE, for errors.
    """

    name: str
    sources: dict[str, float]
    has_shares: bool
    steps: Fraction | None
    epochs: float | None
    max_length: int | None
    learning_rate_factor: float
    place: str


def load_stages(path: str) -> tuple[Stage, ...]:
    """Reads the stages of a YAML file, which is a list of them.

    Raises:
        UserError: the file can't be read, or a value is missing, unknown or outside its range.
    """
    shown = printable(path)
    node = read_yaml(path, "--stages", "stages have three levels")
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(f"--stages {shown} holds no stages; it must be a YAML list, each with {', '.join(KEYS[:3])}")
    stages = tuple(_stage(item, shown) for item in node.value)
    names = [stage.name for stage in stages]
    for i, stage in enumerate(stages):
        if stage.name in names[:i]:
            raise UserError(f"{stage.place}: two stages are called {stage.name!r}; give each a name of its own")
    return _with_whole_length(stages, shown)


def _with_whole_length(stages: tuple[Stage, ...], path: str) -> tuple[Stage, ...]:
    """The same stages.

    Raises:
        UserError: some are in steps and others in epochs, or those in steps aren't the whole training.
    """
    in_steps = [stage for stage in stages if stage.steps is not None]
    if in_steps and len(in_steps) < len(stages):
        raise UserError(f"--stages {path}: some stages are in steps and others in epochs; give all in one of them")
    total = 100 * sum(stage.steps for stage in in_steps)
    if in_steps and abs(total - 100) > TOLERANCE:
        raise UserError(f"--stages {path}: the steps of the stages add up to {float(total):g}%; they must be 100%")
    return stages


def _stage(node: yaml.Node, path: str) -> Stage:
    place = place_of(node, path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place}: a stage must be a mapping with {', '.join(KEYS)}")
    values = mapping_of(node, path)
    refuse_unknown(values, KEYS, path)
    name = text_of(values["name"]) if "name" in values else ""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise UserError(f"{place}: a stage needs a name of 1 to {MAX_NAME} printable characters")
    sources, has_shares = _sources(values.get("sources"), place, path)
    if ("steps" in values) == ("epochs" in values):
        raise UserError(f"{place}: stage {name!r} needs either steps, such as 30%, or epochs, such as 1")
    limit = _positive(values, "max_length", path)
    if limit is not None and limit % 1:
        raise UserError(f"{place}: max_length is {float(limit):g}; it must be a whole number of tokens")
    factor = _positive(values, "learning_rate_factor", path)
    return Stage(
        name,
        sources,
        has_shares,
        steps=_positive(values, "steps", path, percent=True),
        epochs=_as_float(_positive(values, "epochs", path)),
        max_length=None if limit is None else int(limit),
        learning_rate_factor=1.0 if factor is None else float(factor),
        place=place,
    )


def _sources(node: yaml.Node | None, place: str, path: str) -> tuple[dict[str, float], bool]:
    """The sources with their values, and whether these are shares."""
    if node is None:
        return {EVERYTHING: 1.0}, False
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise UserError(f"{place}: sources must be a mapping of sources to numbers, such as {{facts_en: 1}}")
    mapping = mapping_of(node, path)
    if "" in mapping:
        where = place_of(mapping[""], path)
        raise UserError(f"{where}: a source has no name; name a file, a directory or a channel, or *, all rows")
    read = {name: _number(value, name, path) for name, value in mapping.items()}
    kinds = {is_percent for _, is_percent in read.values()}
    if len(kinds) > 1:
        raise UserError(f"{place}: some sources have percents and others plain numbers; give all in one of them")
    for name, (value, _) in read.items():
        if value < 0:
            raise UserError(f"{place}: the source {printable(name)} has {float(value):g}; it must be at least 0")
    total = sum(value for value, _ in read.values())
    if not total:
        raise UserError(f"{place}: all sources have 0, so that nothing would be drawn; give one of them more")
    has_shares = kinds == {True}
    if has_shares and abs(total - 1) * 100 > TOLERANCE:
        raise UserError(f"{place}: the shares of the sources add up to {float(total * 100):g}%; they must be 100%")
    divisor = total if has_shares else 1
    return {name: float(value / divisor) for name, (value, _) in read.items() if value}, has_shares


def _positive(values: dict[str, yaml.Node], key: str, path: str, percent: bool = False) -> Fraction | None:
    """A number above 0, or None where the key isn't there."""
    if key not in values:
        return None
    value, is_percent = _number(values[key], key, path)
    where = place_of(values[key], path)
    if is_percent != percent:
        rule = "a share of the training, such as 30%" if percent else "a plain number"
        raise UserError(f"{where}: {key} is {text_of(values[key])}; it must be {rule}")
    if value <= 0:
        raise UserError(f"{where}: {key} is {text_of(values[key])}; it must be above 0")
    return value


def _number(node: yaml.Node, key: str, path: str) -> tuple[Fraction, bool]:
    """A number such as 2, 0.5, 1/8 or 30%, and whether it was in percent."""
    text = text_of(node).replace(" ", "")
    digits = text.removesuffix("%")
    try:
        if not NUMBER.fullmatch(digits):
            raise ValueError(digits)
        value = _fraction(digits)
    except (ValueError, ZeroDivisionError) as error:
        where = place_of(node, path)
        raise UserError(
            f"{where}: {printable(key)} is {text or 'empty'}; it must be a number such as 2, 0.5, 1/8 or 30%"
        ) from error
    return (value / 100, True) if digits != text else (value, False)


def _fraction(digits: str) -> Fraction:
    above, _, below = digits.partition("/")
    return Fraction(above) / Fraction(below or "1")


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
