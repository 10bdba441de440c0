"""The report of a selection as a page for a browser: the table, histograms of scores, and dropped rows."""

from html import escape
from string import Template
from typing import Any

from dft.data.html import document, html_table
from dft.data.tables import histogram
from dft.printable import printable
from dft.selection.method import Decision
from dft.selection.report import cells, finite
from dft.selection.writing import Dropped

SHOWN_CHARACTERS = 1500  # of a dropped row

STYLE = """\
h3 { font-size: 1rem; }
pre { color: #555; }
"""
BODY = Template("""\
<h1>Selection report: $command</h1>
<p>$summary</p>
$table
<ul>$notes</ul>
$histograms
<h2>Rows that were dropped</h2>
$examples
<h2>Settings</h2>
<pre>$settings</pre>
""")


def page(report: dict[str, Any], decision: Decision, examples: dict[str, list[Dropped]]) -> str:
    """The page; it needs no other file."""
    total = report["total"]
    settings = "\n".join(f"{name}: {value}" for name, value in report["settings"].items())
    body = BODY.substitute(
        command=_shown(report["command"]),
        summary=f"{total['kept']:,} of {total['rows_read']:,} rows are kept.",
        table=html_table(cells(report)),
        notes="\n".join(f"<li>{_shown(note)}</li>" for note in report["notes"]),
        histograms="\n".join(_histogram(name, values) for name, values in decision.scores.items()),
        examples="\n".join(_examples(reason, found) for reason, found in sorted(examples.items())) or "<p>None.</p>",
        settings=_shown(settings),
    )
    return document("Selection report", body, STYLE)


def _shown(text: str) -> str:
    return escape(printable(text, lines=True))


def _histogram(name: str, values: Any) -> str:
    numbers = finite(values)
    if len(numbers) == 0:
        return ""
    return f"<h2>{_shown(name)}</h2>\n{histogram(numbers, unit='')}"


def _examples(reason: str, rows: list[Dropped]) -> str:
    parts = [f"<h3>{_shown(reason)}</h3>"]
    for row in rows:
        score = "" if row.score is None else f", score {row.score:.4g}"
        text = row.row[:SHOWN_CHARACTERS] + ("…" if len(row.row) > SHOWN_CHARACTERS else "")
        place = f"{printable(row.path)}:{row.line}"
        parts.append(f"<p>{escape(place)}{score}: {_shown(row.detail)}</p>\n<pre>{_shown(text)}</pre>")
    return "\n".join(parts)
