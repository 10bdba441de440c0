"""What the recipes' models need of a GPU's memory, by the project's own estimate: the tables of docs/memory.md.

    python benchmarks/recipe_memory.py            # about 2 minutes on one core
    python benchmarks/recipe_memory.py --quick    # two of the models

Nothing is loaded or downloaded: the shapes below are those of the models' public config.json, and no more than shapes.
The last line is JSON.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import Gemma3Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from benchmarks.measuring import markdown_table
from dft.config.command_line import Settings
from dft.config.loss import CHUNK_MB
from dft.model.activations import build_model
from dft.model.memory import GIB, model_sizes
from scripts.estimate_memory import Job, Model, Setting

QUICK = ("Qwen/Qwen3-0.6B-Base", "meta-llama/Llama-3.1-8B")
METHODS = ("full", "lora", "qlora")
GPUS = (1, 2, 4, 8)
LENGTHS = (2048, 8192, 32768)
ROWS = 4  # of a micro-batch, of 2,048 tokens, as in the recipes


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, is_tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        tie_word_embeddings=is_tied,
    )


MODELS: dict[str, PretrainedConfig] = {  # by their names on the hub
    "Qwen/Qwen3-0.6B-Base": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B-Base": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B-Base": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B-Base": _qwen3(4096, 12_288, 36, 32, False),
    "Qwen/Qwen2.5-Math-1.5B": Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "google/gemma-3-4b-pt": Gemma3Config(
        text_config={
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    ),
}


def job_of(method: str, gpus: int, rows: int, length: int, lora_r: int = 16) -> Job:
    """A training with accumulation, every token of it supervised, which is the worst case."""
    return Job(
        method=method,
        lora_r=0 if method == "full" else lora_r,
        gpus=gpus,
        sequence=1,
        max_length=length,
        rows=rows,
        accumulation=2,
        supervised=100.0,
        chunk_mb=CHUNK_MB["cuda"],
        dtype=None,
        bf16=True,
    )


def gib(model: Model, job: Job, recompute: bool, stage: int = 3) -> float:
    """GiB that a GPU must have: without DeepSpeed on one GPU, under ZeRO of a stage on several."""
    setting = Setting(0 if job.gpus == 1 else stage, "none", recompute)
    return model.estimate(job, setting).needed / GIB


def gib_of_recipe(model: Model, settings: Settings, gpus: int, stage: int) -> float:
    """The same for the settings of a recipe."""
    adapters, training = settings.adapters, settings.training
    method = "qlora" if adapters.load_in_4bit else "lora" if adapters.has_adapters else "full"
    job = job_of(method, gpus, training.per_device_train_batch_size, settings.data.max_length, adapters.lora_r)
    return gib(model, job, training.activation_checkpointing, stage)


def parameters(config: PretrainedConfig) -> int:
    sizes = model_sizes(build_model(config, torch.bfloat16))
    return sizes.trained


# ---- the tables ---------------------------------------------------------------------------------


def by_gpus(models: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Lines for each model and method: GiB with recomputation / without, by the number of GPUs."""
    yield ("model", "parameters", "trained", *(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS))
    for name in models:
        model = Model(MODELS[name])
        size = f"{parameters(MODELS[name]) / 1e9:.2f} B"
        for method in METHODS:
            jobs = [job_of(method, gpus, ROWS, 2048) for gpus in GPUS]
            yield (short(name), size, method, *(both(model, job) for job in jobs))


def by_length(models: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Lines for each model and method: the same for one row of some length, on eight GPUs."""
    yield ("model", "trained", *(f"{length:,} tokens" for length in LENGTHS))
    for name in models:
        model = Model(MODELS[name])
        for method in ("full", "lora"):
            jobs = [job_of(method, 8, 1, length) for length in LENGTHS]
            yield (short(name), method, *(both(model, job) for job in jobs))


def short(name: str) -> str:
    return Path(name).name


def both(model: Model, job: Job) -> str:
    """GiB with recomputation, and without."""
    return " / ".join(f"{gib(model, job, recompute):.0f}" for recompute in (True, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two of the models")
    args = parser.parse_args()
    names = QUICK if args.quick else tuple(MODELS)
    tables = {"by number of GPUs": list(by_gpus(names)), "by length": list(by_length(names))}
    for lines in tables.values():
        print(markdown_table(lines), end="\n\n")
    print(json.dumps(tables))


if __name__ == "__main__":
    main()
