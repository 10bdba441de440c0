"""FSDP2 as --fsdp and --fsdp_config ask for it, or accelerate's launcher; imports neither torch nor transformers.

transformers ignores keys of --fsdp_config that it doesn't know, and accelerate reads by itself what its launcher was
told. Here all of it becomes one dictionary.
"""

import json
import os
from pathlib import Path
from typing import Any

from dft.config.options import did_you_mean
from dft.errors import UserError
from dft.launched import accelerate_uses

OPTIONS: dict[str, dict[str, bool]] = {  # the words of --fsdp, and what they set
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"cpu_offload": True},
    "auto_wrap": {},  # layers are always wrapped
}
OFF, ON = ("", "false", "no", "0"), ("true", "yes", "1")
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
TRUTHS = ("reshard_after_forward", "cpu_offload", "cpu_ram_efficient_loading", "activation_checkpointing")
OF_LAUNCHER = {  # keys of --fsdp_config, and how accelerate's launcher passes them on
    "version": "FSDP_VERSION",
    "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD",
    "cpu_offload": "FSDP_OFFLOAD_PARAMS",
    "auto_wrap_policy": "FSDP_AUTO_WRAP_POLICY",
    "transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP",
    "min_num_params": "FSDP_MIN_NUM_PARAMS",
    "state_dict_type": "FSDP_STATE_DICT_TYPE",
    "cpu_ram_efficient_loading": "FSDP_CPU_RAM_EFFICIENT_LOADING",
}
KEYS = (*OF_LAUNCHER, "activation_checkpointing")


def fsdp_config(args: Any) -> dict[str, Any] | None:
    """The configuration of FSDP2, with the keys of --fsdp_config; None where it isn't asked for.

    Args:
        args: an object with the fields of training.DFTTrainingArguments, as they stand on the command line.

    Raises:
        UserError: FSDP1, an unknown option, key or value, or flags that FSDP can't be combined with.
    """
    options = _options(args.fsdp)
    is_launched = accelerate_uses("FSDP")
    if options is None and not is_launched:
        if args.fsdp_config:
            raise UserError("--fsdp_config is given without --fsdp: add --fsdp full_shard, or drop it")
        return None
    config = {key: os.environ[name] for key, name in OF_LAUNCHER.items() if is_launched and name in os.environ}
    for option in options or ():
        config |= OPTIONS[option]
    config |= _read(args.fsdp_config)
    _check(config)
    config = {key: _truth(key, value) if key in TRUTHS else value for key, value in config.items()}
    config["state_dict_type"] = config.get("state_dict_type", STATE_DICTS[0]).upper()
    _check_combinations(args, config)
    return config


def _options(fsdp: Any) -> list[str] | None:
    """The words of --fsdp, none where it is merely on; None where it is off."""
    if fsdp is None or str(fsdp).lower() in OFF:
        return None
    words = fsdp if isinstance(fsdp, list) else str(fsdp).lower().replace(",", " ").split()
    options = [word for word in words if word not in ON]
    for word in options:
        if word not in OPTIONS:
            raise UserError(
                f"--fsdp {fsdp}: {word} is no option of FSDP2{did_you_mean(word, OPTIONS)}; "
                f"known: {', '.join(OPTIONS)}"
            )
    return options


def _read(given: Any) -> dict[str, Any]:
    """What --fsdp_config holds: a dictionary, JSON, or the path of a JSON file. Its keys may begin with fsdp_."""
    if not given:
        return {}
    config = given
    if isinstance(given, str):
        try:
            text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
            config = json.loads(text)
        except (OSError, ValueError) as error:
            raise UserError(f"--fsdp_config {given} can't be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f'--fsdp_config {given}: it must hold a JSON object, such as {{"cpu_offload": true}}')
    return {key.removeprefix("fsdp_"): value for key, value in config.items()}


def _check(config: dict[str, Any]) -> None:
    """Refuses what FSDP2 doesn't have; FSDP1 is deprecated by torch, transformers and accelerate."""
    if str(config.get("version", 2)) != "2":
        raise UserError(
            f"FSDP version {config['version']} is not supported, only FSDP2: set version to 2 in --fsdp_config, and "
            "fsdp_version where accelerate's launcher asks for it, whose default is 1"
        )
    for key in config:
        if key not in KEYS:
            raise UserError(
                f"--fsdp_config: FSDP2 has no key {key}{did_you_mean(key, KEYS)}; known: {', '.join(KEYS)}"
            )
    kind = str(config.get("state_dict_type", STATE_DICTS[0]))
    if kind.upper() not in STATE_DICTS:
        raise UserError(f"--fsdp_config: state_dict_type is {kind}; it must be one of {', '.join(STATE_DICTS)}")


def _truth(key: str, value: Any) -> bool:
    if str(value).lower() not in ON + OFF:
        raise UserError(f"--fsdp_config: {key} is {value}; with FSDP2 it must be true or false")
    return str(value).lower() in ON


def _check_combinations(args: Any, config: dict[str, Any]) -> None:
    if args.deepspeed or accelerate_uses("DEEPSPEED"):
        raise UserError(
            "--fsdp and DeepSpeed both shard the model: give one. scripts/train.sh adds --deepspeed by itself: for "
            "FSDP, start it with LAUNCHER=torchrun DS_CONFIG= (empty)"
        )
    if args.save_only_model and config["state_dict_type"] == "SHARDED_STATE_DICT":
        raise UserError(
            "--save_only_model: checkpoints in shards (state_dict_type SHARDED_STATE_DICT of --fsdp_config) are for "
            "going on from: drop one"
        )
    if args.save_only_model and args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end can't be combined with --save_only_model under FSDP: drop one")
