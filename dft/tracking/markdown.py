"""Text from outside in Markdown: escaped, in tables, and in code."""

import re
from html import escape

from dft.printable import printable


def markdown_table(header: tuple[str, ...], lines: list[tuple[str, ...]], num_left: int = 1) -> str:
    """A Markdown table: the first `num_left` columns to the left, the others to the right."""
    rows = [header, ("---",) * num_left + ("---:",) * (len(header) - num_left), *lines]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def _cell(text: str) -> str:
    """Text that can't break a Markdown table: without pipes and line breaks."""
    return as_text(text).replace("|", "¦")


def as_text(text: str) -> str:
    """Text that is neither Markdown nor HTML, whatever is in it."""
    return re.sub(r"([\\`*\[\]~])", r"\\\1", escape(printable(text), quote=False))


def as_code(text: str) -> str:
    """Text for between two backticks."""
    return printable(text).replace("`", "'")
