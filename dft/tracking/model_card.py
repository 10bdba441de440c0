"""The model card: base model, data, training settings, results, limits and use, as README.md."""

import json
import logging
import re
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from dft.config.adapters import AdapterConfig
from dft.config.loss import LossConfig
from dft.data.names import file_labels
from dft.printable import printable
from dft.tracking.answers import answers_of_step, answers_section
from dft.tracking.curves import final_weights_are_best, series
from dft.tracking.markdown import as_code, as_text, markdown_table

CARD_FILE = "README.md"  # as the Hub shows it
logger = logging.getLogger(__name__)

BY_TOKENS = (
    "Evaluation, if there was any, is of chat rows, token by token. It says nothing about how well answers serve a "
    "purpose, nor about safety, bias or facts; none of that was measured."
)
BY_ANSWERS = (
    "Evaluation is of chat rows, token by token, and of the answers above, by fixed rules. It says little about how "
    "well answers serve a purpose, and nothing about safety and bias; none of that was measured."
)
MARK = "<!-- Written by train_dft.py; it replaces this file as long as this line is in it. -->"
NOT_SHOWN = ("use_simple_dft", "reference_cache_dir")  # of the loss: said by dft_alpha; of one machine
HYPERPARAMETERS = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "optim", "per_device_train_batch_size", "max_tokens_per_batch", "gradient_accumulation_steps",
    "batching", "world_size", "bf16", "fp16", "seed",
)  # fmt: skip


def write_card(about: dict[str, Any], report: dict[str, Any], args: TrainingArguments, state: TrainerState) -> None:
    """Writes the model card to README.md in the output directory, unless that is a file written by somebody else.

    Args:
        about: see run_info.about_run.
        report: see dft.data.report.make_report.
        state: of the trainer at the end of training.
    """
    path = Path(args.output_dir) / CARD_FILE
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        logger.warning("%s is not one that was written here: it is kept, and no model card is written", path)
        return
    path.write_text(model_card(about, report, args, state), encoding="utf-8")


def model_card(about: dict[str, Any], report: dict[str, Any], args: TrainingArguments, state: TrainerState) -> str:
    """Makes a model card in the format of the Hugging Face Hub; the arguments are those of write_card."""
    base, name = _name(about["model"]["model_name_or_path"]), Path(args.output_dir).resolve().name
    quoted = json.dumps(printable(name), ensure_ascii=False)
    loss, adapters = LossConfig(**about["dft"]), AdapterConfig(**about["adapters"])
    best_step = state.best_global_step if final_weights_are_best(args, state) else None
    answers = answers_of_step(args.output_dir, state.global_step if best_step is None else best_step)
    return f"""\
{_front_matter(base, loss, adapters)}
{MARK}

# {as_text(name)}

{"LoRA adapter on " if adapters.has_adapters else ""}`{as_code(base)}`, fine-tuned with {_objective(loss)}

## Data

{_data_table(report)}

{_held_out(about, in_stages="stages" in report)}
{_stages_table(report)}
## Training

{markdown_table(("setting", "value"), _settings(about, args))}

## Results

{_results(state.log_history, best_step)}

Cross-entropy in nats per supervised token. {_weights(args, best_step)}
{answers_section(answers)}
## Limits

- {BY_ANSWERS if answers else BY_TOKENS}
- {_weight_limit(loss)}
- What the base model and the data are licensed for holds for this model too.

## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", {quoted})  # the directory of this file, or its name on the hub
print(chat([{{"role": "user", "content": "Hello"}}], max_new_tokens=256)[0]["generated_text"][-1]["content"])
```

Made with {", ".join(f"{package} {number}" for package, number in about["versions"].items())}\
{f"; code at commit {about['git_commit'][:12]}" if about["git_commit"] else ""}.
"""


def _front_matter(base: str, loss: LossConfig, adapters: AdapterConfig) -> str:
    """The metadata that the hub reads. base_model must be a name on the hub, which a directory is not."""
    library, lora = ("peft", "\n- lora") if adapters.has_adapters else ("transformers", "")
    base_line = f"base_model: {base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    return f"""\
---
{base_line}library_name: {library}
pipeline_tag: text-generation
tags:
- dft
- {"sft" if loss.alpha == 0 else "dynamic-fine-tuning"}{lora}
---"""


def _objective(loss: LossConfig) -> str:
    """What a run was trained with, and how its tokens were weighted."""
    if loss.alpha == 0:
        return "plain cross-entropy (SFT)."
    weighted = "The cross-entropy of each assistant token is weighted by"
    told = f"without gradient; here α = {loss.alpha:g}."
    if loss.objective == "dft":
        return (
            f"the DFT loss (Dynamic Fine-Tuning, arXiv 2508.05629). {weighted} max(floor, α·p^γ + 1 − α), where p is "
            f"the model's own probability of the token, {told}"
        )
    return (
        f"the objective {loss.objective} of the DFT family. {weighted} α·w + 1 − α with w = `{loss.formula}`, where p "
        f"is the model's own probability of the token, {told}"
    )


def _name(model: str) -> str:
    """A model's name; of a directory only the last part, because the others mean nothing on another machine."""
    return Path(model).resolve().name if Path(model).exists() else model


def _data_table(report: dict[str, Any]) -> str:
    """Rows and tokens of each data file."""
    names = file_labels([entry["path"] for entry in report["files"]])
    lines = [
        (
            name,
            f"{entry['rows_read']:,}",
            f"{entry['kept']:,}",
            f"{entry['tokens']:,}",
            f"{entry['supervised_tokens']:,}",
        )
        for name, entry in zip(names, report["files"], strict=True)
    ]
    return markdown_table(("file", "rows read", "rows used", "tokens", "supervised tokens"), lines)


def _stages_table(report: dict[str, Any]) -> str:
    """The stages of the training with their sources, between empty lines; "" if it had none."""
    lines = [
        (
            stage["name"],
            f"{stage['steps']:,}",
            f"{stage['rows']:,}",
            ", ".join(f"{source} × {seen['times_seen']:.3g}" for source, seen in stage["sources"].items()),
        )
        for stage in report.get("stages", [])
    ]
    header = ("stage", "steps", "rows", "sources, and how often each row was seen")
    return f"\n{markdown_table(header, lines)}\n" if lines else ""


def _held_out(about: dict[str, Any], *, in_stages: bool) -> str:
    """A sentence about the training and evaluation rows."""
    rows = about["num_rows"]
    files = ", ".join(map(as_text, file_labels(list(dict.fromkeys(about["data"]["eval_data_files"] or ())))))
    source = f"from {files}" if files else "held out"
    when = "in stages" if in_stages else "in an epoch"
    return f"{rows['training']:,} rows were trained on {when}, {rows['evaluation']:,} evaluated on, {source}."


def _settings(about: dict[str, Any], args: TrainingArguments) -> list[tuple[str, str]]:
    """Names and values of the settings that shape a training, without those that have no effect in this one."""
    loss = LossConfig(**about["dft"])
    dft = {name: value for name, value in about["dft"].items() if name not in NOT_SHOWN}
    dft["dft_alpha"] = loss.alpha
    if loss.objective != "dft":
        del dft["dft_gamma"]
    dft["objective_args"] = ", ".join(f"{name}={value:g}" for name, value in loss.objective_arguments.items()) or None
    data = {name: about["data"][name] for name in ("max_length", "train_on")}
    values_of = vars(args) | {"world_size": args.world_size}  # a property, not a field
    training = {name: values_of[name] for name in HYPERPARAMETERS}
    if args.max_steps > 0:
        del training["num_train_epochs"]
    if args.max_tokens_per_batch:
        del training["per_device_train_batch_size"]
    if 0 < training["warmup_steps"] < 1:
        training["warmup_ratio"] = training.pop("warmup_steps")
    adapters = AdapterConfig(**about["adapters"])
    values = {**dft, **data, "torch_dtype": about["model"]["torch_dtype"], **adapters.shown}
    values |= {"trained parameters": about.get("trained_parameters"), **training}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return [(name, str(value)) for name, value in values.items() if value not in (None, -1)]  # -1: max_steps unset


def _results(history: list[dict[str, Any]], best_step: int | None) -> str:
    """The first and last results, and those of the best checkpoint if its weights are the ones saved."""
    columns = ("first", "last") if best_step is None else ("first", "these weights", "last")
    lines = []
    for name, key in (
        ("cross-entropy, training", "ce_loss"),
        ("mean probability of the correct token, training", "train/avg_p_correct"),
        ("cross-entropy, evaluation", "eval_ce_loss"),
        ("perplexity, evaluation", "eval_perplexity"),
        ("mean probability of the correct token, evaluation", "eval_avg_p_correct"),
        ("token accuracy, evaluation", "eval_acc"),
    ):
        steps, values = series(history, key)
        if steps:
            step_of = {"first": steps[0], "these weights": best_step, "last": steps[-1]}
            text_of = {step: f"{value:.4f} (step {step})" for step, value in zip(steps, values, strict=True)}
            lines.append((name, *(text_of.get(step_of[column], "") for column in columns)))
    return markdown_table(("", *columns), lines)


def _weights(args: TrainingArguments, best_step: int | None) -> str:
    """A sentence about the step whose weights are saved."""
    if best_step is None:
        return "The weights are those of the last step."
    return f"The weights are those of step {best_step}, the checkpoint with the best {args.metric_for_best_model}."


def _weight_limit(loss: LossConfig) -> str:
    """A sentence about the limit that the loss sets: the least weight of a token, max(floor, 1 − alpha)."""
    least = max(loss.dft_floor, 1 - loss.alpha)
    if least == 1:
        return "Trained on rows of chats, it may repeat what they say, right or wrong."
    if loss.objective != "dft":
        return "Tokens to which the objective gives little weight got little gradient, and may not have been learnt."
    return (
        "DFT sharpens what the base model already finds likely. Tokens that it hardly expects got little gradient "
        f"(down to {least:g} of that of plain cross-entropy), so that knowledge new to it may not have been learnt."
    )
