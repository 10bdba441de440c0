"""--fsdp and --fsdp_config: one configuration of FSDP2, whoever asks for it, and the message that a mistake gets."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from dft.config.fsdp import fsdp_config
from dft.errors import UserError
from tests.config.parsing import assert_refused, parse

FULL = {"state_dict_type": "FULL_STATE_DICT"}


def config_of(fsdp: Any, config: Any = None) -> dict[str, Any] | None:
    rest = {"deepspeed": None, "save_only_model": False, "load_best_model_at_end": False}
    return fsdp_config(SimpleNamespace(fsdp=fsdp, fsdp_config=config, **rest))


@pytest.mark.parametrize(
    ("fsdp", "config", "expected"),
    [
        (None, None, None),
        ("False", None, None),
        (True, None, FULL),
        ("true", None, FULL),
        ("full_shard", None, FULL | {"reshard_after_forward": True}),
        ("full_shard auto_wrap", None, FULL | {"reshard_after_forward": True}),
        ("shard_grad_op offload", None, FULL | {"reshard_after_forward": False, "cpu_offload": True}),
        (["full_shard", "offload"], None, FULL | {"reshard_after_forward": True, "cpu_offload": True}),
        ("full_shard", {"reshard_after_forward": "false"}, FULL | {"reshard_after_forward": False}),
        (True, '{"fsdp_version": 2}', FULL | {"version": 2}),
        (True, {"state_dict_type": "sharded_state_dict"}, {"state_dict_type": "SHARDED_STATE_DICT"}),
    ],
)
def test_what_is_asked_for(fsdp, config, expected):
    assert config_of(fsdp, config) == expected


def test_a_file_is_read_and_not_changed(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"transformer_layer_cls_to_wrap": ["Layer"]}))
    assert config_of("full_shard", str(path))["transformer_layer_cls_to_wrap"] == ["Layer"]
    given = {"cpu_offload": 0}
    assert config_of(True, given) == FULL | {"cpu_offload": False}
    assert given == {"cpu_offload": 0}


def test_accelerates_launcher_asks_for_it_too(monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}.items():
        monkeypatch.setenv(name, value)
    assert config_of(None) == FULL | {"version": "2", "cpu_offload": True}
    assert config_of("shard_grad_op", {"cpu_offload": False}) == FULL | {
        **{"version": "2", "cpu_offload": False},
        "reshard_after_forward": False,
    }
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="FSDP version 1 is not supported.*fsdp_version"):
        config_of(None)


WRONG = {
    "unknown option": (["--fsdp", "full_shrad"], "full_shrad is no option of FSDP2; did you mean full_shard?"),
    "of FSDP1": (["--fsdp", "hybrid_shard"], "hybrid_shard is no option of FSDP2"),
    "version 1": (["--fsdp", "--fsdp_config", '{"version": 1}'], "FSDP version 1 is not supported"),
    "key of FSDP1": (["--fsdp", "--fsdp_config", '{"use_orig_params": true}'], "FSDP2 has no key use_orig_params"),
    "value of FSDP1": (
        ["--fsdp", "--fsdp_config", '{"reshard_after_forward": "full_shard"}'],
        "reshard_after_forward is full_shard; with FSDP2 it must be true or false",
    ),
    "local states": (["--fsdp", "--fsdp_config", '{"state_dict_type": "LOCAL"}'], "state_dict_type is LOCAL"),
    "no file": (["--fsdp", "--fsdp_config", "missing.json"], "--fsdp_config missing.json can't be read as JSON"),
    "no object": (["--fsdp", "--fsdp_config", "{]"], "--fsdp_config {] can't be read as JSON"),
    "alone": (["--fsdp_config", '{"version": 2}'], "--fsdp_config is given without --fsdp"),
    "with DeepSpeed": (["--fsdp", "--deepspeed", "ds_config/zero3.json"], "--fsdp and DeepSpeed both shard the model"),
    "shards of the model alone": (
        ["--fsdp", "--save_only_model", "True", "--fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}'],
        "--save_only_model: checkpoints in shards",
    ),
    "the best without a checkpoint": (
        ["--fsdp", "--save_only_model", "True", "--load_best_model_at_end", "True"],
        "can't be combined with --save_only_model under FSDP",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    assert_refused(*WRONG[name])


def test_accelerates_deepspeed_is_deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="both shard the model"):
        config_of(True)


def test_one_process_has_nothing_to_shard(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # which accelerate would obey
    with caplog.at_level(logging.WARNING):
        args = parse("--fsdp", "full_shard").training
    assert "--fsdp: there is one process, and nothing to shard" in caplog.text
    assert (args.fsdp, args.fsdp_config, args.fsdp_plugin_args) == (None, None, None)
    assert args.activation_checkpointing is True


def test_the_models_own_checkpointing_recomputes(monkeypatch):
    """accelerate's draws dropout anew; transformers advises it all the same."""
    advice = []
    monkeypatch.setattr("transformers.training_args.logger.warning", advice.append)
    monkeypatch.setattr("dft.config.training.rank_and_world_size", lambda: (0, 2))
    for config, recomputes in (("{}", True), ('{"activation_checkpointing": false}', False)):
        args = parse("--fsdp", "full_shard", "--fsdp_config", config).training
        assert args.activation_checkpointing is recomputes
        assert args.fsdp_plugin_args["fsdp_version"] == 2
        assert args.fsdp_plugin_args["activation_checkpointing"] is False
    assert not advice


def test_offloading_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("dft.config.training.rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr("dft.config.training.has_accelerator", lambda: False)
    with pytest.raises(UserError, match="--fsdp offload .* there is none here"):
        parse("--fsdp", "full_shard offload")
