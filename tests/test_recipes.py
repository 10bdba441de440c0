"""Every recipe is parsed by the program, says what is true of it, and trains two steps of its architecture."""

import copy
import math
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.recipe_memory import GPUS, LENGTHS, MODELS, ROWS, Model, both, gib_of_recipe, job_of, parameters
from dft.config.command_line import Settings, parse_args
from dft.model.activations import with_layers
from scripts import prepare_pairs
from tests.chat import families
from tests.helpers import ROOT, Outcome, read_log, run_programs, write_jsonl

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
}
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILY_OF = {"qwen3": "qwen3", "qwen2": "qwen2.5", "llama": "llama3", "gemma3": "gemma"}  # by model type
BASE = ("llama", "gemma3")  # model types whose base models have no chat template
BATCH = 256


@cache
def parsed(name: str, *flags: str) -> Settings:
    """What the program makes of a recipe as it stands, and of flags behind it."""
    return parse_args(["--config", str(ROOT / "recipes" / f"{name}.yaml"), *flags])


def comment_of(name: str) -> str:
    """The comment that a recipe begins with, its lines joined."""
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line[1:].strip() for line in lines if line.startswith("#"))


def launches(name: str) -> list[list[str]]:
    """The words of the commands in the comment: variables, then a script and its flags."""
    return [shlex.split(line) for line in comment_of(name).splitlines() if "bash scripts/train.sh" in line]


# ---- what a recipe says -------------------------------------------------------------------------


def test_there_are_recipes_for_all_weights_and_for_adapters_of_every_model():
    assert sorted(NAMES) == sorted(name for stem in NAMES if "lora" not in stem for name in (stem, f"{stem}-lora"))
    assert {parsed(name).model.model_name_or_path for name in NAMES} == set(MODELS)
    assert {name: parsed(name).adapters.has_adapters for name in NAMES} == {name: "lora" in name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_its_commands_are_the_programs_and_keep_the_batch(name):
    for words in launches(name):
        is_alone = words[0] == "LAUNCHER=python"
        assert is_alone or words[0] == "bash" or (ROOT / words[0].removeprefix("DS_CONFIG=")).is_file()
        flags = words[words.index("scripts/train.sh") + 1 :]
        assert flags[:2] == ["--config", f"recipes/{name}.yaml"]
        training = parsed(name, *flags[2:]).training
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert rows * (1 if is_alone else 8) == BATCH
    assert len(launches(name)) in (1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_kept_apart_from_others(name):
    settings = parsed(name)
    assert settings.training.output_dir == f"outputs/{name}"
    assert "ot run at full size" in comment_of(name)
    same_model = yaml.safe_load((ROOT / "recipes" / f"{name.removesuffix('-lora')}.yaml").read_text())
    assert settings.model.model_name_or_path == same_model["model_name_or_path"]


def test_the_papers_recipe_has_the_papers_numbers():
    settings = parsed("qwen2.5-math-1.5b")
    training = settings.training
    assert (settings.data.max_length, training.num_train_epochs, settings.loss.dft_alpha) == (2048, 1, 1)
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_ratio) == (5e-5, "cosine", 0.1)
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.01)
    assert (training.max_grad_norm, training.bf16) == (1.0, True)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b-lora", "gemma-3-4b"])
def test_the_memory_in_its_comment_is_the_estimate(name):
    settings = parsed(name)
    model = Model(MODELS[settings.model.model_name_or_path])
    stage = int(re.search(r"eight (?:GPUs )?under ZeRO-(\d)", comment_of(name).replace("\n", " "))[1])
    expected = {round(gib_of_recipe(model, settings, gpus, stage)) for gpus in (1, 8)}
    assert {int(number) for number in re.findall(r"(\d+)\s+GiB", comment_of(name))} == expected


def test_the_table_says_what_the_comments_say():
    """The GiB of one GPU and of each of eight, for all weights and for adapters."""
    table = re.findall(
        r"(?m)^\| `recipes/([\w.-]+).yaml`, .* \| (\d+), (\d+) \| (\d+), (\d+) \|$",
        (ROOT / "recipes" / "README.md").read_text(),
    )
    assert sorted(line[0] for line in table) == [name for name in NAMES if "lora" not in name]
    for stem, *numbers in table:
        for name, written in ((stem, numbers[::2]), (f"{stem}-lora", numbers[1::2])):
            assert sorted(written) == sorted(re.findall(r"(\d+)\s+GiB", comment_of(name))), name


def test_the_tables_of_the_memory_are_the_estimates():
    """A cell of each table in docs/memory.md."""
    model, text = Model(MODELS["Qwen/Qwen3-0.6B-Base"]), (ROOT / "docs" / "memory.md").read_text()
    in_tables = re.findall(r"(?m)^\| Qwen3-0.6B-Base .*\| full \| (.*) \|$", text)
    by_gpus, by_length = (line.split(" | ") for line in in_tables)
    assert both(model, job_of("full", 8, ROWS, 2048)) == by_gpus[GPUS.index(8)]
    assert both(model, job_of("full", 8, 1, 8192)) == by_length[LENGTHS.index(8192)]


def test_the_shapes_are_of_the_models_that_they_are_named_after():
    """Their parameters, in billions, as the models' names or cards say."""
    sizes = {"0.6B": 0.60, "1.7B": 1.72, "3-4B": 4.02, "3-8B": 8.19, "1.5B": 1.54, "3.1-8B": 8.03, "4b-pt": 4.30}
    for name, config in MODELS.items():
        expected = next(size for part, size in sizes.items() if part in name)
        assert parameters(config) / 1e9 == pytest.approx(expected, abs=0.006), name


# ---- two steps ----------------------------------------------------------------------------------


def small(config: PretrainedConfig, vocab_size: int) -> PretrainedConfig:
    """The configuration with two thin layers; whatever else a model does is left as it is."""
    config = with_layers(copy.deepcopy(config), 2)
    text = config.get_text_config()
    text.update({**SMALL, "vocab_size": vocab_size, "pad_token_id": 0})
    if text is not config:
        text.layer_types = ["sliding_attention", "full_attention"]
        config.vision_config.update({**SMALL_VISION, "image_size": 28})
        config.mm_tokens_per_image = 4
    return config


@pytest.fixture(scope="module")
def small_models(tmp_path_factory) -> dict[str, Path]:
    """{name on the hub: directory} of random models, each with a tokenizer of its family."""
    directories = {}
    for name, config in MODELS.items():
        directory = directories[name] = tmp_path_factory.mktemp("model")
        tokenizer = families.tokenizer(FAMILY_OF[config.model_type])
        if config.model_type in BASE:
            tokenizer.chat_template = None
        tokenizer.save_pretrained(directory)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(small(config, len(tokenizer))).save_pretrained(directory)
    return directories


@pytest.fixture(scope="module")
def outcomes(small_models, tmp_path_factory) -> dict[str, tuple[Outcome, Path]]:
    """Every recipe on its small model, and its output: what needs a GPU, and the size of the run, are overridden."""
    places = tmp_path_factory.mktemp("recipes")
    rows = [{"problem": f"{i} + 1?", "solution": f"It is {i + 1}.", "source": "sums"} for i in range(24)]
    data = places / "chats.jsonl"
    columns = ["--question", "problem", "--answer", "solution"]
    prepare_pairs.main([str(write_jsonl(places / "pairs.jsonl", rows)), *columns, "--output", str(data)])
    commands = {}
    for name in NAMES:
        model = small_models[parsed(name).model.model_name_or_path]
        commands[name] = [
            *("train_dft.py", "--config", f"recipes/{name}.yaml"),
            *("--model_name_or_path", model, "--data_files", data, "--output_dir", places / name),
            *("--torch_dtype", "float32", "--bf16", "False", "--max_steps", 2, "--gradient_accumulation_steps", 1),
            *("--validation_split_percentage", 10, "--logging_steps", 1, "--data_cache_dir", places / "cache"),
            *("--save_strategy", "no"),
        ]
    found = run_programs(commands, places / "outcomes")
    return {name: (found[name], places / name) for name in NAMES}


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_its_architecture(outcomes, name):
    outcome, directory = outcomes[name]
    assert outcome.status == 0, outcome.output[-3000:]
    settings = parsed(name)
    steps = [record for record in read_log(directory) if "learning_rate" in record]
    assert [record["train/dft_alpha"] for record in steps] == [settings.loss.dft_alpha] * 2
    assert all(math.isfinite(record["ce_loss"]) and record["grad_norm"] > 0 for record in steps)
    assert steps[-1]["learning_rate"] == settings.training.learning_rate
    is_adapter = (directory / "adapter_config.json").exists()
    assert is_adapter == settings.adapters.has_adapters
    config = MODELS[settings.model.model_name_or_path]
    assert f"Model: {type(config).__name__.removesuffix('Config')}For" in outcome.output
