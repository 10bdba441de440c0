"""The parser of all flags and its --help, made from the cached listing."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from dft.config.options import did_you_mean
from dft.errors import UserError

COMMON_TRAINING_FLAGS = set(
    "output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
    "batching max_tokens_per_batch "
    "gradient_accumulation_steps learning_rate lr_scheduler_type warmup_ratio weight_decay max_grad_norm bf16 "
    "activation_checkpointing seed deepspeed logging_steps logging_dir disable_tqdm report_to run_name project "
    "eval_strategy eval_steps save_strategy save_steps save_total_limit save_only_model metric_for_best_model "
    "load_best_model_at_end resume_from_checkpoint resume_anyway do_train dataloader_num_workers".split()
)
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors, and suggest the nearest choice."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            told = (
                f"invalid choice: {str(value)!r}{did_you_mean(str(value), choices)} (choose from {', '.join(choices)})"
            )
            raise argparse.ArgumentError(action, told)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\nsee python train_dft.py --help")


def build_parser(listing: dict[str, Any]) -> Parser:
    """The parser of the flags of a listing, grouped for --help.

    Args:
        listing: see listing.load_listing.
    """
    parser = Parser(
        prog="train_dft.py",
        usage="%(prog)s --model_name_or_path MODEL --data_files FILE [FILE …] [--config FILE.yaml] [flags]",
        description="Fine-tune a causal language model on chat data with the DFT loss.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line overrides it.")
    for title, entries in listing["groups"].items():
        group = parser.add_argument_group(title)
        for entry in entries:
            _add_flag(group, entry)
    _split_training_group(parser)
    return parser


def known_options(listing: dict[str, Any]) -> list[str]:
    """All option strings with their aliases, but for hyphenated twins and for --no_x, which says --x False."""
    entries = [entry for group in listing["groups"].values() for entry in group if entry.get("action") is None]
    flags = [flag for entry in entries for flag in entry["flags"] if "-" not in flag.lstrip("-")]
    return ["--config", *flags]


def flag_names(listing: dict[str, Any]) -> dict[str, str]:
    """The name of the flag that each of `known_options` sets."""
    entries = [entry for group in listing["groups"].values() for entry in group]
    dest_of = {flag: entry["dest"] for entry in entries for flag in entry["flags"]} | {"--config": "config"}
    return {option: dest_of[option] for option in known_options(listing)}


def _add_flag(group: argparse._ArgumentGroup, entry: dict[str, Any]) -> None:
    more = {key: value for key, value in entry.items() if key != "flags"}
    if entry.get("action") is None:
        more["type"] = _type_named(more["type"], more["choices"])
    group.add_argument(*entry["flags"], **more)


def _type_named(name: str, choices: list[Any] | None) -> Callable[[str], Any]:
    """The function that reads a value from a word of the command line."""
    if name == "choice":
        by_text = {str(choice): choice for choice in choices}
        return lambda text: by_text.get(text, text)
    types = {"str": str, "int": int, "float": float, "string_to_bool": string_to_bool, "json": json.loads}
    return types.get(name, python_only)


def string_to_bool(text: str) -> bool:
    """A truth value, as transformers' HfArgumentParser reads it.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def python_only(text: str) -> NoReturn:
    """Refuses a value that has no form on the command line."""
    raise argparse.ArgumentTypeError(f"{text!r}: this can't be written on the command line, only given from Python")


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
