"""The command line and the YAML file that it may name, parsed into settings."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from dft.config.adapters import AdapterConfig
from dft.config.answers import AnswersConfig
from dft.config.data import DataConfig
from dft.config.listing import load_listing
from dft.config.loss import LossConfig
from dft.config.metrics import MetricsConfig
from dft.config.model import ModelConfig
from dft.config.options import did_you_mean
from dft.config.parser import build_parser, flag_names, known_options
from dft.config.training_checks import (
    check_answers,
    check_evaluation,
    check_row_fits,
    check_stages,
    check_training,
)
from dft.errors import UserError
from dft.files import expand_path
from dft.secrets import without_secrets

if TYPE_CHECKING:
    from dft.config.training import DFTTrainingArguments

PATHS = (  # flags that hold a path, or several; what begins with { is JSON in its place
    *("model_name_or_path", "data_files", "eval_data_files", "chat_template", "data_cache_dir", "output_dir"),
    *("adapter", "reference_cache_dir", "stages"),
    *("logging_dir", "resume_from_checkpoint", "deepspeed", "fsdp_config", "accelerator_config"),
)


GROUPS = (ModelConfig, AdapterConfig, DataConfig, LossConfig, MetricsConfig, AnswersConfig)  # before those of Trainer


class Settings(NamedTuple):
    """All settings of a run, by group; none of them is changed after it was parsed."""

    model: ModelConfig
    adapters: AdapterConfig
    data: DataConfig
    loss: LossConfig
    metrics: MetricsConfig
    answers: AnswersConfig
    training: "DFTTrainingArguments"


def parse_args(argv: list[str] | None = None) -> Settings:
    """Parses a command line, by default this program's.

    Mistakes are found before torch and transformers are imported, which takes seconds; what depends on this machine's
    GPUs is checked afterwards.

    Raises:
        UserError: unknown or contradictory flags, values outside their range, a bad file.
    """
    listing = load_listing()
    if argv is None:
        argv = sys.argv[1:]
        sys.argv[1:] = without_secrets(argv)  # trackers record it
    values = parse_values(argv, listing)
    groups = [_of_class(cls, values) for cls in GROUPS]
    data = groups[GROUPS.index(DataConfig)]
    training = {entry["dest"]: values[entry["dest"]] for entry in listing["groups"]["training"]}
    check_training(SimpleNamespace(**training), listing["trackers"], listing["compile_backends"])
    check_row_fits(SimpleNamespace(**training), data)
    check_evaluation(SimpleNamespace(**training), data)
    check_answers(SimpleNamespace(**training), groups[GROUPS.index(AnswersConfig)], data)
    check_stages(SimpleNamespace(**training), data)
    training = resolve_evaluation(training, data)

    from dft.config.training import DFTTrainingArguments  # imports torch

    try:
        return Settings(*groups, DFTTrainingArguments(**training))
    except ValueError as error:  # of transformers' own checks
        raise UserError(str(error)) from error


def parse_values(argv: list[str], listing: dict[str, Any]) -> dict[str, Any]:
    """The value of every flag, {name: value}, of a command line and of the YAML file that it names.

    Raises:
        UserError: unknown flags, values of another type, a bad file.
    """
    config_flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_flag.add_argument("--config")
    config, _ = config_flag.parse_known_args(argv)
    if config.config is not None:
        argv = config_to_argv(expand_path(config.config, "--config"), flag_names(listing)) + argv
    namespace, unknown = build_parser(listing).parse_known_args(argv)
    if unknown:
        names = [word.split("=")[0] for word in unknown if word.startswith("--")] or unknown
        known = known_options(listing)
        raise UserError("\n".join(f"unknown option {name}{did_you_mean(name, known)}" for name in names))
    values = vars(namespace)
    return values | {name: _expanded(values[name], f"--{name}") for name in PATHS}


def _expanded(value: Any, flag: str) -> Any:
    """A path, or a list of them, with ~ and environment variables replaced; anything else as it is."""
    if isinstance(value, list):
        return [_expanded(item, flag) for item in value]
    is_path = isinstance(value, str) and not value.lstrip().startswith("{")
    return expand_path(value, flag) if is_path else value


def _of_class(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)})


def config_to_argv(path: str, names: dict[str, str]) -> list[str]:
    """The flags in a YAML file, as command-line words.

    Args:
        names: of all flags, {option with its dashes: name}; an option may be another spelling of the name.

    Raises:
        UserError: the file is missing, not a YAML mapping, names unknown options, or one twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        repeated = [f"{path}:{line}: {what}" for line, what in _repeated_keys(yaml.compose(text), names)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} can't be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must be a YAML mapping of flags to values, such as `dft_alpha: 0.7`")
    if repeated:
        raise UserError("\n".join(repeated))
    unknown = [key for key in settings if f"--{key}" not in names]
    if unknown:
        raise UserError("\n".join(f"{path}: unknown option {key}{did_you_mean(f'--{key}', names)}" for key in unknown))
    argv = []
    for key, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv


def _repeated_keys(node: yaml.Node | None, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    """The lines, from 1, where a key of a YAML mapping is given again, and what to say of them."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated_keys(item, {})
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, tuple[int, str]] = {}  # name -> where it was given, and how
    for key, value in node.value:
        line, written = key.start_mark.line + 1, str(key.value)
        name = names.get(f"--{written}", written)
        if name in first:
            earlier_line, earlier = first[name]
            other = "" if earlier == written else f" as {earlier}, another name of it,"
            yield line, f"{written} is given twice, first{other} in line {earlier_line}"
        else:
            first[name] = line, written
        yield from _repeated_keys(value, {})


def resolve_evaluation(values: dict[str, Any], data: DataConfig) -> dict[str, Any]:
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
