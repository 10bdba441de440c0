"""YAML files of settings, read as nodes: every value keeps its line, for errors, and no key is given twice."""

from pathlib import Path

import yaml

from dft.config.options import did_you_mean
from dft.errors import UserError
from dft.printable import printable


def read_yaml(path: str | Path, flag: str, levels: str) -> yaml.Node | None:
    """The root of a YAML file; None for an empty one.

    Args:
        flag: the setting that names the file, for the error message.
        levels: says how deep such a file may be nested, for the same.

    Raises:
        UserError: the file can't be read, or isn't YAML.
    """
    shown = printable(path)
    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise UserError(f"{flag} {shown} can't be read: it is nested too deeply; {levels}") from error
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:  # the path, or an escape, may be no text
        raise UserError(f"{flag} {shown} can't be read: {printable(str(error), lines=True)}") from error


def mapping_of(node: yaml.MappingNode, path: str) -> dict[str, yaml.Node]:
    """The values of a mapping by key.

    Args:
        path: of the file, made printable, for errors.

    Raises:
        UserError: a key is a list or a mapping, or is given twice.
    """
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        where = place_of(key, path)
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: a list or a mapping stands where a name must be; give each a line of its own")
        name = text_of(key)
        if name in found:
            raise UserError(f"{where}: {name} is given twice")
        found[name] = value
    return found


def refuse_unknown(values: dict[str, yaml.Node], known: tuple[str, ...], path: str) -> None:
    """Raises UserError where a mapping has a key that isn't one of these; `path` as for mapping_of."""
    for key, value in values.items():
        if key not in known:
            hint = did_you_mean(key, known)
            raise UserError(f"{place_of(value, path)}: unknown key {key}{hint}; known: {', '.join(known)}")


def text_of(node: yaml.Node) -> str:
    """The text of a scalar, with control characters escaped; "" for a list or a mapping."""
    return printable(node.value.strip()) if isinstance(node, yaml.ScalarNode) else ""


def place_of(node: yaml.Node, path: str) -> str:
    """FILE:LINE of a node."""
    return f"{path}:{node.start_mark.line + 1}"
