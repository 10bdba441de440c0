"""Rubrics: criteria with weights and a scale, read from YAML."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import yaml

from dft.config.yaml_nodes import mapping_of, place_of, read_yaml, refuse_unknown, text_of
from dft.errors import UserError
from dft.printable import printable

DEFAULT = Path(__file__).with_name("rubric.yaml")
LOWEST, HIGHEST = 1, 5  # scores
POINTS = tuple(str(point) for point in range(LOWEST, HIGHEST + 1))
KEYS = ("name", "weight", "question", "scale")
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED = ("total", "overall")  # lines of the reports


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Args:
        weight: above 0; only its share of all weights matters.
        question: what the judge is asked.
        scale: what each score from LOWEST to HIGHEST means.
    """

    name: str
    weight: float
    question: str
    scale: tuple[str, ...]


@dataclass(frozen=True)
class Rubric:
    """The criteria that answers are judged by, at least one."""

    criteria: tuple[Criterion, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(criterion.name for criterion in self.criteria)

    @cached_property
    def digest(self) -> str:
        """A hash of all that is in it, 16 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()

    def weighted(self, values: dict[str, float]) -> float:
        """The weighted mean of a value for each criterion: Σ w·v / Σ w."""
        total = sum(criterion.weight for criterion in self.criteria)
        return sum(criterion.weight * values[criterion.name] for criterion in self.criteria) / total


def load_rubric(path: Path | None) -> Rubric:
    """Reads a rubric: a mapping whose one key, criteria, is a list of criteria.

    Args:
        path: a YAML file; None for the rubric that comes with the project.

    Raises:
        UserError: the file can't be read, or a key is missing, unknown or has a value that isn't allowed.
    """
    path = path or DEFAULT
    shown = printable(path)
    root = read_yaml(path, "--rubric", "a rubric has four levels")
    rule = f"it must be a mapping with the key criteria, a list; see {DEFAULT.name} of the project"
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--rubric {shown} holds no rubric; {rule}")
    values = mapping_of(root, shown)
    refuse_unknown(values, ("criteria",), shown)
    nodes = values.get("criteria")
    if not isinstance(nodes, yaml.SequenceNode) or not nodes.value:
        raise UserError(f"--rubric {shown} holds no criteria; {rule}")
    criteria: list[Criterion] = []
    for node in nodes.value:
        criterion = _criterion(node, shown)
        if criterion.name in [earlier.name for earlier in criteria]:
            raise UserError(f"{place_of(node, shown)}: two criteria are called {criterion.name}; rename one")
        criteria.append(criterion)
    return Rubric(tuple(criteria))


def _criterion(node: yaml.Node, path: str) -> Criterion:
    place = place_of(node, path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place}: a criterion must be a mapping with {', '.join(KEYS)}")
    values = mapping_of(node, path)
    refuse_unknown(values, KEYS, path)
    missing = [key for key in KEYS if key not in values]
    if missing:
        raise UserError(f"{place}: the criterion lacks the key {missing[0]}; it needs {', '.join(KEYS)}")
    name = text_of(values["name"])
    if not NAME.fullmatch(name) or name in RESERVED:
        raise UserError(
            f"{place_of(values['name'], path)}: name is {name or 'empty'}; it must be 1 to 32 lower-case letters, "
            f"digits and underscores, begin with a letter, and not be {' or '.join(RESERVED)}"
        )
    question = _sentence(values["question"], "question", path)
    return Criterion(name, _weight(values["weight"], path), question, _scale(values["scale"], path))


def _weight(node: yaml.Node, path: str) -> float:
    text = text_of(node)
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:  # nor NaN
        raise UserError(
            f"{place_of(node, path)}: weight is {text or 'empty'}; it must be a number above 0. Leave out a "
            "criterion that shall not count"
        )
    return weight


def _scale(node: yaml.Node, path: str) -> tuple[str, ...]:
    rule = f"it must be a mapping of each whole number from {LOWEST} to {HIGHEST} to what that score means"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{place_of(node, path)}: scale isn't a mapping; {rule}")
    values = mapping_of(node, path)
    if set(values) != set(POINTS):
        raise UserError(f"{place_of(node, path)}: scale has the keys {', '.join(values) or '(none)'}; {rule}")
    return tuple(_sentence(values[point], f"scale, {point}", path) for point in POINTS)


def _sentence(node: yaml.Node, key: str, path: str) -> str:
    """The text of a scalar, its lines joined."""
    text = " ".join(node.value.split()) if isinstance(node, yaml.ScalarNode) else ""
    if not text:
        raise UserError(f"{place_of(node, path)}: {key} is empty or no text; it must be a sentence")
    return text
