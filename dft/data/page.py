"""The data report as a page for a browser: the table, a histogram of lengths, and sample rows."""

from html import escape
from pathlib import Path
from string import Template

from transformers import PreTrainedTokenizerBase

from dft.data.html import document, html_table
from dft.data.prepared import PreparedData
from dft.data.report import report_cells, report_notes, report_warnings, runs
from dft.data.tables import histogram
from dft.printable import printable

STYLE = """\
pre { color: #777; }
pre b { font-weight: normal; color: #0a6b2b; background: #dff3e4; }
"""
BODY = Template("""\
<h1>Data report</h1>
<p>$summary</p>
$table
<ul>$notes</ul>
<h2>Lengths of the training rows, in tokens</h2>
$histogram
<h2>The first training row of each file</h2>
<p>What is supervised is <b style="font-weight:normal;color:#0a6b2b;background:#dff3e4">green</b>;
the rest is what the model reads.</p>
$samples
""")


def write_page(data: PreparedData, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes the page; it needs no other file."""
    samples = []
    for row in data.samples:
        parts = runs(row, tokenizer)
        shown = [(escape(printable(part, lines=True)), is_supervised) for part, is_supervised in parts]
        text = "".join(f"<b>{part}</b>" if is_supervised else part for part, is_supervised in shown)
        samples.append(f"<h3>{escape(printable(row.path))}:{row.line}</h3>\n<pre>{text}</pre>")
    body = BODY.substitute(
        summary=f"{len(data.train):,} training rows and {data.num_evaluation:,} evaluation rows.",
        table=html_table(report_cells(data.report)),
        notes="\n".join(
            f"<li>{escape(note)}</li>" for note in report_warnings(data.report) + report_notes(data.report)
        ),
        histogram=histogram(data.lengths),
        samples="\n".join(samples),
    )
    path.write_text(document("Data report", body, STYLE), encoding="utf-8")
