"""Training curves, drawn from the log records of a run."""

import gc
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from dft.files import dispensable

CURVES_FILE = "training_curves.png"
PANELS = {  # title: {label: key of the log records}
    "Cross-entropy (nats per token)": {"train": "ce_loss", "evaluation": "eval_ce_loss"},
    "DFT loss": {"train": "loss", "evaluation": "eval_loss"},
    "Probability of the correct token": {
        "train": "train/avg_p_correct",
        "evaluation": "eval_avg_p_correct",
    },
    "Token accuracy": {"train": "token_accuracy", "evaluation": "eval_acc"},
    "Learning rate": {"learning rate": "learning_rate"},
    "Gradient norm": {"gradient norm": "grad_norm"},
}


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key in the trainer's log, in the order of its records."""
    records = [record for record in log_history if key in record]
    return [record["step"] for record in records], [record[key] for record in records]


def final_weights_are_best(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the model at the end of training is that of the best checkpoint, and not of the last step."""
    return args.load_best_model_at_end and state.best_model_checkpoint is not None


def plot_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training curves to a PNG file, a panel for each of PANELS."""
    import matplotlib  # imported here, because only rank 0 draws and the import takes time

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    # fixed margins, because matplotlib's automatic layouts draw everything twice
    margins = {"left": 0.045, "right": 0.99, "bottom": 0.07, "top": 0.95, "wspace": 0.18, "hspace": 0.28}
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), gridspec_kw=margins)
    for axis, (title, keys) in zip(axes.flat, PANELS.items(), strict=True):
        for color, (label, key) in zip(("tab:blue", "tab:orange"), keys.items(), strict=False):
            steps, values = series(log_history, key)
            if steps:
                marker = "o" if label == "evaluation" or len(steps) == 1 else None
                axis.plot(steps, values, color=color, label=label, marker=marker, markersize=4)
        axis.set_title(title)
        axis.set_xlabel("step")
        # short numbers fit the fixed margins: 0.002 is drawn as 2, with a factor of 1e-3 above the axis
        axis.ticklabel_format(axis="y", scilimits=(-2, 4))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(keys) > 1 and axis.lines:
            axis.legend()
    try:
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
        # A figure and its parts refer to each other: 4 to 6 MB that stay until the collector of such circles runs,
        # which it rarely does by itself in a training
        gc.collect()


class Curves(TrainerCallback):
    """Draws the curves whenever a checkpoint is saved, so that a run that is interrupted has them too."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir) / CURVES_FILE

    def on_save(self, args, state, control, **kwargs):
        """Draws the curves on rank 0."""
        if state.is_world_process_zero:
            with dispensable(self.path):
                plot_curves(state.log_history, self.path)
