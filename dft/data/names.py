"""Short names that tell files apart, for tables and for metrics."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dft.printable import printable

MAX_NAME = 64  # characters in a table, where that leaves names apart
HEAD = 24  # characters that are kept of the beginning of a longer name


def file_labels(paths: Sequence[str]) -> list[str]:
    """A name for each of several different paths: its end, with as many directories as it takes to tell them apart.

    Control characters are escaped. The middle of a long name is left out, unless the names would become the same.
    """
    labels = [printable(ending) for ending in shortest_endings([Path(os.path.abspath(p)).parts[1:] for p in paths])]
    short = [_shortened(label) for label in labels]
    uses = Counter(short)
    return numbered([cut if uses[cut] == 1 else label for cut, label in zip(short, labels, strict=True)])


def shortest_endings(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """For each path, given by its parts: the shortest end of it that no other path has; all of it if there is none."""
    uses = Counter(parts[-n:] for parts in set(paths) for n in range(1, len(parts) + 1))
    endings = []
    for parts in paths:
        n = next((n for n in range(1, len(parts)) if uses[parts[-n:]] == 1), len(parts))
        endings.append("/".join(parts[-n:]))
    return endings


def numbered(names: Sequence[str]) -> list[str]:
    """The same names, those that occur before with a number behind them: a, b, a (2)."""
    taken = set(names)
    seen: set[str] = set()
    unique = []
    for name in names:
        number = 2
        new = name
        while new in seen or (new != name and new in taken):
            new = f"{name} ({number})"
            number += 1
        seen.add(new)
        unique.append(new)
    return unique


def _shortened(name: str) -> str:
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:HEAD]}…{name[HEAD + 1 - MAX_NAME :]}"
