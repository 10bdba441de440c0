"""Tables as text, and histograms as SVG."""

import numpy as np

BARS = 40
WIDTH, HEIGHT, HEAD, FOOT = 720, 160, 18, 20  # of the histogram, in pixels; the height with the head above the bars


def aligned(cells: list[tuple[str, ...]], num_left: int) -> list[str]:
    """The lines of a table: the first `num_left` columns to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def histogram(values: np.ndarray, unit: str = "tokens") -> str:
    """An SVG of how many rows have which value.

    Args:
        values: [N] whole numbers, or finite real ones; at least one.
        unit: of the values, for the label of a bar; "" for none.
    """
    is_whole = np.issubdtype(values.dtype, np.integer)
    bins = min(BARS, max(1, int(np.ptp(values)))) if is_whole else BARS
    counts, borders = np.histogram(values, bins=bins)
    shown = [f"{border:,.0f}" if is_whole else f"{border:.4g}" for border in borders]
    middle = (borders[0] + borders[-1]) / 2
    width = WIDTH / len(counts)
    bars = []
    for i, count in enumerate(counts):
        height = (HEIGHT - HEAD) * count / counts.max()
        title = f"<title>{count:,} rows of {shown[i]} to {shown[i + 1]} {unit}</title>"
        place = f'x="{i * width:.1f}" y="{HEIGHT - height:.1f}" width="{max(width - 1, 1):.1f}" height="{height:.1f}"'
        bars.append(f"<rect {place}>{title}</rect>")
    labels = [
        f'<text x="{x}" y="{HEIGHT + FOOT - 4}" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in (
            (0, "start", shown[0]),
            (WIDTH / 2, "middle", f"{middle:,.0f}" if is_whole else f"{middle:.4g}"),
            (WIDTH, "end", shown[-1]),
        )
    ]
    labels.append(f'<text x="{WIDTH}" y="12" text-anchor="end">highest bar: {counts.max():,} rows</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + FOOT}" width="{WIDTH}" role="img">{"".join(bars + labels)}</svg>'
