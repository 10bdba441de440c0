"""Draws the weight of every objective, and its pull on the correct token, over p; writes docs/objective_curves.png.

python benchmarks/objective_curves.py

Shapes: N points, V vocabulary.
"""

import matplotlib
import torch

from benchmarks.measuring import ROOT
from dft.config.loss import LossConfig
from dft.config.objectives import OBJECTIVES
from dft.loss.objectives import make_objective
from dft.loss.statistics import TokenStatistics, concentration_of, entropy_of, top_entropy_of

VOCABULARY = 1000
FEW = 4  # other tokens, where the model hesitates between few
REFERENCE_P = 0.3
TOP_K = int(OBJECTIVES["eaft"].parameters["top_k"].default)
SHOWN = {"talr": {"tau": 0.5}, "anchored": {"strength": 0.1}}  # by default these can't be told from dft
GROUPS = {  # title of the legend: the names, and how their lines are drawn
    "weights by p alone": (["sft", "threshold", "dft", "talr", "chord"], "-"),
    f"by the whole distribution\n(thin: only {FEW} others)": (["eaft", "deft", "idft"], "--"),
    f"by the starting weights\n(p_ref = {REFERENCE_P:g})": (["prior", "anchored", "importance"], "-."),
}
COLORS = {
    **{"sft": "0.65", "threshold": "tab:green", "dft": "tab:blue", "talr": "tab:cyan", "chord": "tab:purple"},
    **{"eaft": "tab:red", "deft": "black", "idft": "tab:orange"},
    **{"prior": "tab:olive", "anchored": "tab:pink", "importance": "tab:brown"},
}


def tokens_of(p: torch.Tensor, others: int) -> TokenStatistics:
    """Statistics of tokens with the probabilities p [N]; so many others share 1 - p equally, and the rest have 0."""
    probabilities = torch.zeros(len(p), VOCABULARY)
    probabilities[:, 0] = p
    probabilities[:, 1 : others + 1] = ((1 - p) / others)[:, None]
    return TokenStatistics(
        targets=torch.zeros(len(p), dtype=torch.int64),
        nll=-torch.log(p),
        p_correct=p,
        is_top1=p >= probabilities[:, 1],
        entropy=entropy_of(probabilities),
        concentration=concentration_of(probabilities),
        top_entropy=top_entropy_of(torch.log(probabilities), TOP_K),
        reference_log_p=torch.full_like(p, REFERENCE_P).log(),
    )


def main() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = torch.linspace(0.001, 0.999, 999)
    many, few = tokens_of(p, VOCABULARY - 1), tokens_of(p, FEW)
    figure, panels = plt.subplots(1, 2, figsize=(13.5, 6), layout="constrained")
    handles = []
    for title, (names, style) in GROUPS.items():
        handles.append(plt.Line2D([], [], linestyle="none", label=title))
        for name in names:
            objective = make_objective(LossConfig(objective=name, objective_args=SHOWN.get(name)))
            more = "".join(f", {key} {value:g}" for key, value in SHOWN.get(name, {}).items())
            line = {"color": COLORS[name], "linestyle": style}
            width = 5 if name == "sft" else 2  # others lie on it
            weight = objective(many)
            (handle,) = panels[0].plot(p, weight, label=f"{name}{more}", linewidth=width, **line)
            panels[1].plot(p, weight * (1 - p), linewidth=width, **line)
            handles.append(handle)
            if style == "--":
                panels[0].plot(p, objective(few), linewidth=0.9, **line)
                panels[1].plot(p, objective(few) * (1 - p), linewidth=0.9, **line)
    panels[0].set(title="weight w", ylim=(-0.05, 1.9))
    panels[1].set(title="pull on the correct token: w · (1 − p)", ylim=(-0.03, 1.05))
    for panel in panels:
        panel.set(xlabel="p, the probability of the correct token", xlim=(0, 1))
        panel.axhline(0, color="0.5", linewidth=0.6)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(handles=handles, loc="outside right center", frameon=False, handlelength=3)
    for text in legend.get_texts():
        if text.get_text() in GROUPS:
            text.set_fontweight("bold")
    figure.suptitle(f"{VOCABULARY:,} tokens; all but the correct one are equally likely")
    figure.savefig(ROOT / "docs" / "objective_curves.png", dpi=110)


if __name__ == "__main__":
    main()
