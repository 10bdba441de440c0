"""The data report as a page for a browser: the table, a histogram of lengths, and sample rows."""

from html import escape
from pathlib import Path
from string import Template

import numpy as np
from transformers import PreTrainedTokenizerBase

from dft.data.prepared import PreparedData
from dft.data.report import report_cells, report_notes, report_warnings, runs
from dft.printable import printable

BARS = 40
WIDTH, HEIGHT, FOOT = 720, 160, 20  # of the histogram, in pixels

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


def histogram(lengths: np.ndarray) -> str:
    """An SVG of how many rows have which length."""
    counts, borders = np.histogram(lengths, bins=min(BARS, max(1, int(np.ptp(lengths)))))
    width = WIDTH / len(counts)
    bars = []
    for i, count in enumerate(counts):
        height = HEIGHT * count / counts.max()
        title = f"<title>{count:,} rows of {borders[i]:,.0f} to {borders[i + 1]:,.0f} tokens</title>"
        place = f'x="{i * width:.1f}" y="{HEIGHT - height:.1f}" width="{max(width - 1, 1):.1f}" height="{height:.1f}"'
        bars.append(f"<rect {place}>{title}</rect>")
    labels = [
        f'<text x="{x}" y="{HEIGHT + FOOT - 4}" text-anchor="{anchor}">{length:,.0f}</text>'
        for x, anchor, length in (
            (0, "start", borders[0]),
            (WIDTH / 2, "middle", (borders[0] + borders[-1]) / 2),
            (WIDTH, "end", borders[-1]),
        )
    ]
    labels.append(f'<text x="{WIDTH}" y="12" text-anchor="end">highest bar: {counts.max():,} rows</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" width="{WIDTH}" role="img">{"".join(bars + labels)}</svg>'
