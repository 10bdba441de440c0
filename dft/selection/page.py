"""The report of a selection as a page for a browser: the table, histograms of scores, and dropped rows."""

from html import escape
from string import Template
from typing import Any

from dft.data.tables import histogram
from dft.printable import printable
from dft.selection.method import Decision
from dft.selection.report import cells, finite
from dft.selection.writing import Dropped

SHOWN_CHARACTERS = 1500  # of a dropped row

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Selection report</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .75rem; color: #555; }
rect { fill: #4a7fb5; } text { font-size: 12px; fill: #555; }
</style>
<h1>Selection report: $command</h1>
<p>$summary</p>
<div class="scroll"><table>$table</table></div>
<ul>$notes</ul>
$histograms
<h2>Rows that were dropped</h2>
$examples
<h2>Settings</h2>
<pre>$settings</pre>
</html>
""")


def page(report: dict[str, Any], decision: Decision, examples: dict[str, list[Dropped]]) -> str:
    """The page; it needs no other file."""
    header, *lines = cells(report)
    rows = [("th", header), *(("td", line) for line in lines)]
    total = report["total"]
    settings = "\n".join(f"{name}: {value}" for name, value in report["settings"].items())
    return PAGE.substitute(
        command=_shown(report["command"]),
        summary=f"{total['kept']:,} of {total['rows_read']:,} rows are kept.",
        table="\n".join(
            "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>" for tag, line in rows
        ),
        notes="\n".join(f"<li>{_shown(note)}</li>" for note in report["notes"]),
        histograms="\n".join(_histogram(name, values) for name, values in decision.scores.items()),
        examples="\n".join(_examples(reason, found) for reason, found in sorted(examples.items())) or "<p>None.</p>",
        settings=_shown(settings),
    )


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
