"""The report of a selection: counts by reason, the distribution of scores, settings; as JSON and as a table."""

from collections import Counter
from typing import Any

import numpy as np

from dft.data.names import file_labels
from dft.data.tables import aligned
from dft.printable import printable
from dft.selection.method import Decision
from dft.selection.writing import Written

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SHOWN_REASONS = 3


def make_report(command: str, settings: dict[str, Any], results: list[Written], decision: Decision) -> dict[str, Any]:
    """What selection_report.json holds, but for the names of the files that are written."""
    total = Written("total", None)
    for result in results:
        total.rows_read += result.rows_read
        total.kept += result.kept
        total.rewritten += result.rewritten
        total.dropped += result.dropped
    return {
        "command": command,
        "settings": settings,
        "files": [result.as_json() for result in results],
        "total": total.as_json(),
        "scores": {name: distribution(finite(values)) for name, values in decision.scores.items()},
        "facts": decision.facts,
        "notes": decision.notes,
    }


def finite(values: Any) -> np.ndarray:
    """The values that are numbers, [N]."""
    array = np.asarray(values)
    return array if np.issubdtype(array.dtype, np.integer) else array[np.isfinite(array)]


def distribution(values: np.ndarray) -> dict[str, Any]:
    """Count, mean and percentiles of scores; None for both where there are no scores."""
    if len(values) == 0:
        return {"count": 0, "mean": None, "percentiles": None}
    percentiles = np.percentile(values, PERCENTILES).tolist()
    shown = {str(p): round(value, 6) for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"count": len(values), "mean": round(float(values.mean()), 6), "percentiles": shown}


def cells(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of counts: a header, the files, and the total if there are several."""
    labels = file_labels([entry["path"] for entry in report["files"]])
    entries = list(zip(labels, report["files"], strict=True))
    entries += [("total", report["total"])] if len(entries) > 1 else []
    lines = [("file", "dropped for", "rows read", "kept", "dropped")]
    for label, entry in entries:
        dropped = sum(entry["dropped"].values())
        numbers = (f"{number:,}" for number in (entry["rows_read"], entry["kept"], dropped))
        lines.append((label, reasons_in_words(entry["dropped"]), *numbers))
    return lines


def reasons_in_words(dropped: dict[str, int]) -> str:
    """The commonest reasons with their counts."""
    commonest = Counter(dropped).most_common()
    words = ", ".join(f"{n:,} {reason}" for reason, n in commonest[:SHOWN_REASONS])
    return words + (f", {len(commonest) - SHOWN_REASONS} more" if len(commonest) > SHOWN_REASONS else "") or "–"


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    return "\n".join(aligned(cells(report), num_left=2) + [printable(note) for note in report["notes"]])
