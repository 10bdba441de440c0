"""What the pages for a browser share: the frame, its style, and tables."""

from html import escape

STYLE = """\
body { font: 14px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7f7f7; padding: .75rem; }
rect { fill: #4a7fb5; } text { font-size: 12px; fill: #555; }
"""


def document(title: str, body: str, style: str) -> str:
    """A page that needs no other file.

    Args:
        title, body: HTML; what comes from outside is escaped already.
        style: rules of this page beside those of all.
    """
    return f"""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{STYLE}{style}</style>
{body}</html>
"""


def html_table(cells: list[tuple[str, ...]]) -> str:
    """A table, whose first line is its header; a wide one can be scrolled."""
    header, *lines = cells
    rows = [("th", header), *(("td", line) for line in lines)]
    text = "\n".join(
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>" for tag, line in rows
    )
    return f'<div class="scroll"><table>{text}</table></div>'
