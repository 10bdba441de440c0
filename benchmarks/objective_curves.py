"""Draws the weight of every objective, and its pull on the correct token, over p; writes docs/objective_curves.png.

python benchmarks/objective_curves.py
"""

import matplotlib
import torch

from benchmarks.measuring import ROOT
from dft.config.loss import LossConfig
from dft.config.objectives import OBJECTIVES
from dft.loss.objectives import make_objective
from dft.loss.statistics import TokenStatistics, concentration_of, entropy_of, top_entropy_of

VOCABULARY = 1000
REFERENCE_P = 0.3
SHOWN = {"talr": {"tau": 0.5}, "anchored": {"strength": 0.1}}  # by default these can't be told from dft


def tokens_of(p: torch.Tensor) -> TokenStatistics:
    """Statistics of tokens with the probabilities p [N], beside which all others are equally likely."""
    others = ((1 - p) / (VOCABULARY - 1))[:, None].expand(-1, VOCABULARY - 1)
    probabilities = torch.cat([p[:, None], others], dim=1)
    return TokenStatistics(
        targets=torch.zeros(len(p), dtype=torch.int64),
        nll=-torch.log(p),
        p_correct=p,
        is_top1=p >= others[:, 0],
        entropy=entropy_of(probabilities),
        concentration=concentration_of(probabilities),
        top_entropy=top_entropy_of(torch.log(probabilities), 20),
        reference_log_p=torch.full_like(p, REFERENCE_P).log(),
    )


def main() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    p = torch.linspace(0.002, 0.998, 499)
    tokens = tokens_of(p)
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    styles = ["-", "--", "-.", ":"]
    for i, name in enumerate(OBJECTIVES):
        config = LossConfig(objective=name, objective_args=SHOWN.get(name))
        weight = make_objective(config)(tokens)
        more = "".join(f", {key} {value:g}" for key, value in SHOWN.get(name, {}).items())
        line = {"label": f"{name}{more}", "color": f"C{i % 10}" if i < 10 else "black", "linestyle": styles[i % 4]}
        panels[0].plot(p, weight, **line)
        panels[1].plot(p, weight * (1 - p), **line)
    panels[0].set(title="weight w", xlabel="p of the correct token", ylim=(-0.15, 2.0))
    panels[1].set(title="pull w·(1 − p)", xlabel="p of the correct token", ylim=(-0.15, 1.2))
    for panel in panels:
        panel.axhline(0, color="gray", linewidth=0.6)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(f"{VOCABULARY:,} tokens, all but the correct one equally likely; p_ref = {REFERENCE_P:g}")
    figure.savefig(ROOT / "docs" / "objective_curves.png", dpi=110)


if __name__ == "__main__":
    main()
