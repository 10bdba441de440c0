"""What the runs of the study say: tables with paired differences to tuned SFT, and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import markdown_table
from benchmarks.miniature.study import ALPHAS, Size, best_rates, objectives_of
from dft.judging.intervals import t_quantile

METRICS = ("target", "wording", "longer", "kept", "ends", "ce", "calibration_error")
BLUES = ("#b3d0ec", "#6ba3d6", "#2f7abf", "#0b3c73")
STYLES = {  # color and marker of every objective
    "base": ("tab:green", "*"),
    "sft": ("0.4", "s"),
    **{name: (color, "o") for name, color in zip(ALPHAS[1:], BLUES, strict=True)},
    **{name: (color, "v") for name, color in (("gamma 0.5", "gold"), ("gamma 2", "darkorange"))},
    **{name: (color, "D") for name, color in (("floor 0.1", "tab:red"), ("warm-up 0.5", "lightcoral"))},
    **{name: (color, "^") for name, color in (("eaft", "tab:purple"), ("deft", "orchid"), ("threshold", "tab:brown"))},
    **{name: (color, "P") for name, color in (("anchored", "tab:cyan"), ("prior", "tab:olive"))},
}
COLORS_OF_RATES = {name: STYLES[name][0] for name in ("sft", "dft 0.5", "dft 1")}
BASE = "base"

Cell = tuple[str, str]
Record = dict[str, Any]
Rates = dict[tuple[str, str, str], float]  # of each (prior, data, objective)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the half width of its 95% confidence interval by Student's t."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), t_quantile(len(values) - 1) * error


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """The mean of the differences between two runs of one seed, and the half width of its 95% interval."""
    return mean_and_interval([ours[seed] - theirs[seed] for seed in sorted(ours)])


def final_runs(rates: Rates, records: list[Record]) -> list[Record]:
    """The runs with test problems, of base models and at the best rates; a study that went on may have others."""
    return [
        record
        for record in records
        if record["split"] == "test"
        and rates.get((record["prior"], record["data"], record["objective"]), 0.0) == record["rate"]
    ]


def by_seed(finals: list[Record], cell: Cell, objective: str, metric: str) -> dict[int, Any]:
    """A metric of the final runs of an objective, {seed: value}."""
    return {
        record["seed"]: record[metric]
        for record in finals
        if (record["prior"], record["data"]) == cell and record["objective"] == objective
    }


def summarize(size: Size, records: list[Record]) -> list[dict[str, Any]]:
    """Of every cell and objective the learning rate, means of all metrics, and differences to SFT in two of them."""
    rates = best_rates(size, records)
    records = final_runs(rates, records)
    found = []
    for cell in size.cells:
        for name in (BASE, *objectives_of(size, cell)):
            values = {
                metric: by_seed(records, cell, name, metric) for metric in METRICS if _has(records, cell, metric)
            }
            line: dict[str, Any] = {"prior": cell[0], "data": cell[1], "objective": name}
            line |= {metric: mean_and_interval(list(of_seeds.values())) for metric, of_seeds in values.items()}
            if name != BASE:
                line["rate"] = rates[*cell, name]
                for metric in ("target", "longer", "kept", "ce"):
                    if metric in values:
                        sft = by_seed(records, cell, "sft", metric)
                        line[f"{metric} - sft"] = paired_difference(values[metric], sft)
            found.append(line)
    return found


def _has(records: list[Record], cell: Cell, metric: str) -> bool:
    return all(metric in record for record in records if (record["prior"], record["data"]) == cell)


def tables(size: Size, summary: list[dict[str, Any]]) -> str:
    """A Markdown table for every cell."""
    parts = []
    for cell in size.cells:
        head = ("", "rate", "target", "− SFT", "kept", "− SFT", "longer", "wording", "ends", "CE", "ECE")
        lines: list[tuple[str, ...]] = [head]
        for line in summary:
            if (line["prior"], line["data"]) == cell:
                lines.append(_table_line(size, line))
        parts.append(f"### Prior: {cell[0]}; data: {cell[1]}\n\n{markdown_table(lines)}")
    return "\n\n".join(parts)


def _table_line(size: Size, line: dict[str, Any]) -> tuple[str, ...]:
    def percent(metric: str) -> str:
        return f"{100 * line[metric][0]:.1f}" if metric in line else "–"

    def difference(metric: str) -> str:
        if metric not in line or line["objective"] == "sft":
            return ""
        mean, half = line[metric]
        clear = "**" if abs(mean) > half else ""
        return f"{clear}{100 * mean:+.1f} ± {100 * half:.1f}{clear}"

    edge = "*" if line.get("rate") in (size.rates[0], size.rates[-1]) else ""
    rate = f"{line['rate']:.0e}{edge}".replace("e-0", "e-") if "rate" in line else ""
    return (
        *(line["objective"], rate, percent("target"), difference("target - sft"), percent("kept")),
        *(difference("kept - sft"), percent("longer"), percent("wording"), percent("ends")),
        *(f"{line['ce'][0]:.3f}", f"{line['calibration_error'][0]:.3f}"),
    )


# ---- figures ------------------------------------------------------------------------------------


def draw_frontier(size: Size, summary: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the target over what was kept of the other skills, a panel for each cell."""
    figure, panels = _panels(len(size.cells))
    for panel, cell in zip(panels, size.cells, strict=True):
        for line in summary:
            if (line["prior"], line["data"]) == cell:
                color, marker = STYLES[line["objective"]]
                large = 10 if marker == "*" else 6
                panel.plot(100 * line["kept"][0], 100 * line["target"][0], marker, color=color, markersize=large)
        panel.set(title=_title(cell), xlabel="other skills kept, %", ylabel="target right, %")
        panel.margins(0.12)
    _save(figure, [_handle(name, *style) for name, style in STYLES.items()], path)


def draw_alphas(size: Size, summary: list[dict[str, Any]], path: Path) -> None:
    """Target, longer problems and kept skills over alpha, a panel for each cell; bars are of the paired difference."""
    lines = {"target": "tab:blue", "kept": "tab:red", "longer": "tab:purple"}
    figure, panels = _panels(len(size.cells))
    alphas = [0.0, *(float(name.split()[1]) for name in ALPHAS[1:])]
    for panel, cell in zip(panels, size.cells, strict=True):
        found = {line["objective"]: line for line in summary if (line["prior"], line["data"]) == cell}
        for metric, color in lines.items():
            if metric in found["sft"]:
                means = [100 * found[name][metric][0] for name in ALPHAS]
                halves = [100 * found[name][f"{metric} - sft"][1] for name in ALPHAS]
                panel.errorbar(alphas, means, halves, color=color, marker="o", markersize=4, capsize=2, elinewidth=0.8)
                panel.axhline(100 * found[BASE][metric][0], color=color, linestyle=":", linewidth=1)
        panel.set(title=_title(cell), xlabel="alpha", ylabel="right, %")
    handles = [_handle(name, color, "o") for name, color in lines.items()]
    _save(figure, [*handles, _handle("base model", "0.3", "", ":")], path)


def draw_rates(size: Size, records: list[Record], path: Path) -> None:
    """Target and kept skills over the learning rate in the runs that chose it, a panel for each cell."""
    figure, panels = _panels(len(size.cells))
    for panel, cell in zip(panels, size.cells, strict=True):
        for name, color in COLORS_OF_RATES.items():
            for metric, style in (("target", "-"), ("kept", "--")):
                means = [_mean_at(records, cell, name, rate, metric) for rate in size.rates]
                panel.plot(size.rates, means, color=color, linestyle=style, marker="o", markersize=4)
        panel.set(title=_title(cell), xlabel="learning rate", ylabel="right, %", xscale="log")
    handles = [_handle(name, color, "o", "-") for name, color in COLORS_OF_RATES.items()]
    _save(figure, [*handles, _handle("target", "0.3", "", "-"), _handle("kept", "0.3", "", "--")], path)


def _mean_at(records: list[Record], cell: Cell, name: str, rate: float, metric: str) -> float:
    key = (*cell, name, rate, "validation")
    fields = ("prior", "data", "objective", "rate", "split")
    return 100 * float(np.mean([record[metric] for record in records if tuple(record[f] for f in fields) == key]))


def draw_histograms(size: Size, records: list[Record], path: Path) -> None:
    """How p of the right tokens of test answers is distributed, a panel for each cell."""
    records = final_runs(best_rates(size, records), records)
    figure, panels = _panels(len(size.cells))
    for panel, cell in zip(panels, size.cells, strict=True):
        for name, color in ({BASE: "tab:green"} | COLORS_OF_RATES).items():
            shares = np.mean(list(by_seed(records, cell, name, "p_histogram").values()), axis=0)
            panel.stairs(100 * shares, np.linspace(0, 1, len(shares) + 1), color=color)
        panel.set(title=_title(cell), xlabel="p of the right token", ylabel="tokens, %", yscale="log")
    _save(figure, [_handle(n, c, "", "-") for n, c in ({BASE: "tab:green"} | COLORS_OF_RATES).items()], path)


def _panels(count: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(count, 5)
    rows = -(-count // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.3 * columns, 3.0 * rows + 0.6), layout="constrained", squeeze=False
    )
    flat = list(panels.flat)
    for panel in flat[count:]:
        panel.remove()
    for panel in flat[:count]:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, flat[:count]


def _title(cell: Cell) -> str:
    return f"prior {cell[0]}, {cell[1]}"


def _handle(label: str, color: str, marker: str, line: str = "none") -> Any:
    import matplotlib.pyplot as plt

    return plt.Line2D([], [], color=color, marker=marker, linestyle=line, label=label)


def _save(figure: Any, handles: list[Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def figures(size: Size, records: list[Record], summary: list[dict[str, Any]], directory: Path) -> None:
    """All figures, as PNG files in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    draw_frontier(size, summary, directory / "evidence_frontier.png")
    draw_alphas(size, summary, directory / "evidence_alpha.png")
    draw_rates(size, records, directory / "evidence_rates.png")
    draw_histograms(size, records, directory / "evidence_p.png")
