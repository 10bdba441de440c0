"""The results of a training: saves the model, its metrics and state; writes curves, model card and summary."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from dft.files import dispensable
from dft.model.adapters import share_trained
from dft.tracking.console import summary
from dft.tracking.curves import CURVES_FILE, final_weights_are_best, plot_curves
from dft.tracking.model_card import CARD_FILE, write_card


def save_run(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Writes the final model, its tokenizer, the metrics and the trainer's state to the output directory.

    All ranks must call it together.

    Args:
        metrics: of the training.
    """
    args = trainer.args
    trainer.save_model()  # first, so that whatever happens in an evaluation, the model is there
    _save_metrics(trainer, "train", metrics)
    if trainer.eval_dataset is not None:
        _save_metrics(trainer, "eval", _evaluation_of_final_weights(trainer))
    trainer.save_state()
    if args.process_index == 0:
        path = Path(args.output_dir) / "training_args.json"
        with dispensable(path):
            path.write_text(args.to_json_string() + "\n", encoding="utf-8")


def save_evaluation(trainer: Trainer) -> None:
    """Evaluates a model that isn't trained here, and writes the metrics to the output directory alone.

    All ranks must call it together.
    """
    _save_metrics(trainer, "eval", trainer.evaluate())


def _evaluation_of_final_weights(trainer: Trainer) -> dict[str, float]:
    """The metrics of the evaluation at the step whose weights are saved; evaluates them if there was none."""
    state = trainer.state
    step = state.best_global_step if final_weights_are_best(trainer.args, state) else state.global_step
    done = [record for record in state.log_history if "eval_loss" in record and record["step"] == step]
    return {key: value for key, value in done[-1].items() if key != "step"} if done else trainer.evaluate()


def _save_metrics(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """Writes metrics to a file, and prints all but those of each source, which may be very many."""
    trainer.log_metrics(split, {key: value for key, value in metrics.items() if key.count("/") < 2})
    trainer.save_metrics(split, metrics)


def present_run(trainer: Trainer, about: dict[str, Any], report: dict[str, Any]) -> None:
    """Draws the curves, writes the model card and prints the summary.

    Args:
        about: see run_info.describe_run.
        report: see dft.data.report.make_report.
    """
    about = about | {"trained_parameters": share_trained(trainer.model)}
    curves, card = (Path(trainer.args.output_dir) / name for name in (CURVES_FILE, CARD_FILE))
    with dispensable(curves):
        plot_curves(trainer.state.log_history, curves)
    with dispensable(card):
        write_card(about, report, trainer.args, trainer.state)
    print(summary(trainer))
