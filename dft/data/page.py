"""The data report as a page for a browser: the table, a histogram of lengths, and sample rows."""

from html import escape
from pathlib import Path
from string import Template

from transformers import PreTrainedTokenizerBase

from dft.data.prepared import PreparedData
from dft.data.report import report_cells, report_notes, report_warnings, runs
from dft.data.tables import histogram
from dft.printable import printable

PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Data report</title>
<style>
body { font: 14px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .75rem; color: #777; }
pre b { font-weight: normal; color: #0a6b2b; background: #dff3e4; }
rect { fill: #4a7fb5; } text { font-size: 12px; fill: #555; }
</style>
<h1>Data report</h1>
<p>$summary</p>
<div class="scroll"><table>$table</table></div>
<ul>$notes</ul>
<h2>Lengths of the training rows, in tokens</h2>
$histogram
<h2>The first training row of each file</h2>
<p>What is supervised is <b style="font-weight:normal;color:#0a6b2b;background:#dff3e4">green</b>;
the rest is what the model reads.</p>
$samples
</html>
""")


def write_page(data: PreparedData, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes the page; it needs no other file."""
    header, *lines = report_cells(data.report)
    rows = [("th", header), *(("td", line) for line in lines)]
    samples = []
    for row in data.samples:
        parts = runs(row, tokenizer)
        shown = [(escape(printable(part, lines=True)), is_supervised) for part, is_supervised in parts]
        text = "".join(f"<b>{part}</b>" if is_supervised else part for part, is_supervised in shown)
        samples.append(f"<h3>{escape(printable(row.path))}:{row.line}</h3>\n<pre>{text}</pre>")
    page = PAGE.substitute(
        summary=f"{len(data.train):,} training rows and {data.num_evaluation:,} evaluation rows.",
        table="\n".join(
            "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>" for tag, line in rows
        ),
        notes="\n".join(
            f"<li>{escape(note)}</li>" for note in report_warnings(data.report) + report_notes(data.report)
        ),
        histogram=histogram(data.lengths),
        samples="\n".join(samples),
    )
    path.write_text(page, encoding="utf-8")
