"""The command line and the configuration file: --help, --config, and what is said of a flag that doesn't exist."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_origin

import yaml
from transformers import HfArgumentParser

from dft.batching.packing import round_up
from dft.config.arguments import DataArguments, DFTArguments, LoggingArguments, ModelArguments, did_you_mean
from dft.config.training import DFTTrainingArguments
from dft.errors import UserError


class HelpFormatter(argparse.HelpFormatter):
    """One spelling for each flag, without the hyphenated twins, and the default where it says something."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if action.choices:
            values = "{" + ",".join(map(str, action.choices)) + "}"
        else:
            kind = action.metavar or getattr(action.type, "__name__", "")
            values = {"string_to_bool": "True|False", "str": "TEXT", "int": "N", "float": "X"}.get(kind, kind.upper())
        return f"{', '.join(names)} {values}{' …' if action.nargs == '+' else ''}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.option_strings and action.default not in (None, argparse.SUPPRESS)
        return (action.help or "") + (" [%(default)s]" if has_default else "")


class Parser(HfArgumentParser):
    """HfArgumentParser whose complaints are UserErrors."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}\nsee python train_dft.py --help")


COMMON_TRAINING_FLAGS = set(
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "batching max_tokens_per_batch "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_ratio weight_decay max_grad_norm bf16 "
    "activation_checkpointing seed deepspeed logging_steps logging_dir disable_tqdm report_to run_name project "
    "eval_strategy eval_steps save_strategy save_steps save_total_limit save_only_model metric_for_best_model "
    "load_best_model_at_end resume_from_checkpoint dataloader_num_workers".split()
)
DATACLASSES = (ModelArguments, DataArguments, DFTArguments, LoggingArguments, DFTTrainingArguments)


def build_parser() -> Parser:
    """The parser of all flags, grouped for --help."""
    parser = Parser(
        DATACLASSES,
        prog="train_dft.py",
        usage="%(prog)s --model_name_or_path MODEL --data_files FILE [FILE …] [--config FILE.yaml] [flags]",
        description="Fine-tune a causal language model on chat data with the DFT loss.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line overrides it.")
    for action in parser._actions:
        if action.type is dict or get_origin(action.type) is dict:
            action.type = json.loads
    _split_training_group(parser)
    return parser


def _split_training_group(parser: Parser) -> None:
    """Puts the training flags that most runs set into a group of their own, before the hundred others."""
    others = parser._action_groups.pop()
    common = parser.add_argument_group("training")
    common._group_actions = [a for a in others._group_actions if a.dest in COMMON_TRAINING_FLAGS]
    others._group_actions = [a for a in others._group_actions if a.dest not in COMMON_TRAINING_FLAGS]
    others.title = "all other training flags (transformers.TrainingArguments)"
    parser._action_groups.append(others)
    for group in parser._action_groups:  # --no_x is accepted; --x False says the same
        group._group_actions = [a for a in group._group_actions if not isinstance(a, argparse._StoreFalseAction)]


def known_options() -> list[str]:
    """All option strings, with their aliases."""
    names = ["--config"]
    for fields in map(dataclasses.fields, DATACLASSES):
        for f in fields:
            names += [f"--{f.name}", *f.metadata.get("aliases", [])] if f.init else []
    return names


def config_to_argv(path: str) -> list[str]:
    """The flags in a YAML file, as command-line words.

    Raises:
        UserError: the file is missing, not a YAML mapping, or names unknown options.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must be a YAML mapping of flags to values, such as `dft_alpha: 0.7`")
    known = known_options()
    unknown = [key for key in settings if f"--{key}" not in known]
    if unknown:
        raise UserError("\n".join(f"{path}: unknown option {key}{did_you_mean(f'--{key}', known)}" for key in unknown))
    argv = []
    for key, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv


def resolve_evaluation(values: dict[str, Any], data: DataArguments) -> dict[str, Any]:
    """Training values with the evaluation settings that were left open filled in.

    Raises:
        UserError: an evaluation strategy without evaluation data.
    """
    values = dict(values)
    if not data.has_evaluation:
        if values["eval_strategy"] not in (None, "no"):
            raise UserError(
                f"--eval_strategy {values['eval_strategy']} needs evaluation data: give --eval_data_files, or a "
                "--validation_split_percentage above 0"
            )
        return values
    if values["eval_strategy"] is None:
        saving = values["save_strategy"]
        if values["eval_steps"] is not None:
            values["eval_strategy"] = "steps"
        elif saving == "steps":
            values["eval_strategy"], values["eval_steps"] = "steps", values["save_steps"]
        else:
            values["eval_strategy"] = "epoch"
    if values["eval_strategy"] != "no" and values["metric_for_best_model"] is None:
        values["metric_for_best_model"] = "eval_acc"
    if values["greater_is_better"] is None and values["metric_for_best_model"] is not None:
        values["greater_is_better"] = not values["metric_for_best_model"].endswith(("loss", "perplexity"))
    return values


def check_room(training: DFTTrainingArguments, data: DataArguments) -> None:
    """Stops where the longest row wouldn't fit into a micro-batch."""
    room = training.max_tokens_per_batch
    longest = data.max_length if training.batching in ("padding_free", "packed") else round_up(data.max_length)
    if room is not None and room < longest:
        raise UserError(
            f"--max_tokens_per_batch is {room}, but a row may have {longest} tokens: raise it, or lower --max_length"
        )


def parse_args(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, DFTArguments, LoggingArguments, DFTTrainingArguments]:
    """Parses the command line, and the YAML file it names, into the five groups of arguments.

    Raises:
        UserError: unknown or contradictory flags, values outside their range, a bad file.
    """
    argv = sys.argv[1:] if argv is None else argv
    config_flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_flag.add_argument("--config")
    config, _ = config_flag.parse_known_args(argv)
    if config.config is not None:
        argv = config_to_argv(config.config) + argv

    namespace, unknown = build_parser().parse_known_args(argv)
    if unknown:
        names = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
        raise UserError("\n".join(f"unknown option {name}{did_you_mean(name, known_options())}" for name in names))

    def values_of(cls: type) -> dict[str, Any]:
        return {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls) if f.init}

    model, data, dft, logging = (cls(**values_of(cls)) for cls in DATACLASSES[:-1])
    try:
        training = DFTTrainingArguments(**resolve_evaluation(values_of(DFTTrainingArguments), data))
        check_room(training, data)
    except ValueError as error:  # transformers' own checks
        raise UserError(str(error)) from error
    return model, data, dft, logging, training
