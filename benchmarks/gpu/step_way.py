"""Trains a model for a few steps in one way and measures them; the worker of step.py, which names the ways.

Rows are as long as the conversations of corpus.py, with random tokens. The first steps are not measured, and the last
one is run under the profiler. Nobody recomputes activations.
"""

import argparse
import gc
import math
import resource
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainerCallback

from benchmarks.corpus import conversations
from benchmarks.gpu.part import NO_CUDA, Skipped, serve
from benchmarks.measuring import installed
from benchmarks.train_step_run import SIZES, Counted, arguments_of, make_tokenizer
from dft.batching.attention import choose_attention
from dft.metrics.throughput import ModelFlops, peak_tflops_of

SHAPES = {
    **SIZES,
    "1.7b": SIZES["0.6b"] | {"hidden_size": 2048, "intermediate_size": 6144},
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    },
}  # fmt: skip
Rows = list[dict[str, list[int]]]
NUM_COSTS = 20  # of a step are listed
BYTES_PER_TOKEN = 4  # of text, about
ADDED_TOKENS = 5  # by a chat template to every message


class Sizes:
    """How much is trained: on a GPU 16,384 tokens a step, without accumulation."""

    def __init__(self, is_tiny: bool):
        self.is_tiny = is_tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.max_length = 1024 if is_tiny else 8192  # of a row, and of a packed row
        self.packed_rows = 1 if is_tiny else 2  # in a step
        self.warm, self.steps = (1, 4) if is_tiny else (4, 14)
        self.logging_steps = 1 if is_tiny else 5

    def rows_per_step(self, rows: Rows) -> int:
        """How many single rows hold as many tokens as the packed ones."""
        mean = float(np.mean([len(row["input_ids"]) for row in rows]))
        return max(1, round(self.packed_rows * self.max_length / mean))


def chat_rows(num_tokens: int, vocabulary: int, max_length: int) -> Rows:
    """Rows of about so many tokens: the lengths of conversations, of which the assistant's turns are supervised."""
    rng = np.random.default_rng(0)
    rows: Rows = []
    total = 0
    for messages in conversations(num_tokens):  # more than enough
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            length = ADDED_TOKENS + len(message["content"].encode()) // BYTES_PER_TOKEN
            ids += rng.integers(3, vocabulary, length).tolist()
            labels += ids[-length:] if message["role"] == "assistant" else [-100] * length
        rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
        total += len(rows[-1]["input_ids"])
        if total >= num_tokens:
            break
    return rows


class Clock(TrainerCallback):
    """The seconds from the end of one step to that of another. In between the host may run ahead of the GPU."""

    def __init__(self, first: int, last: int):
        self.seconds = 0.0
        self._first, self._last = first, last

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self._first, self._last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.seconds


class ProfiledStep(TrainerCallback):
    """Runs one step under the profiler.

    Attributes:
        costs: the most expensive kernels, or operators on a processor: name, milliseconds, share of all.
    """

    def __init__(self, step: int, device: str):
        self.costs: list[dict[str, Any]] = []
        self._step, self._is_cuda = step, device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        self._profile = profile(activities=activities)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            self._profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self._step + 1:
            return
        self._profile.stop()
        spent: dict[str, float] = {}  # in microseconds
        for event in self._profile.key_averages():
            is_range = event.is_user_annotation or event.key.startswith(("Optimizer.", "ProfilerStep"))
            if is_range or (event.device_type == DeviceType.CUDA) != self._is_cuda:
                continue
            spent[event.key] = event.self_device_time_total if self._is_cuda else event.self_cpu_time_total
        total = sum(spent.values()) or 1.0
        largest = sorted(spent, key=lambda name: -spent[name])[:NUM_COSTS]
        self.costs = [{"name": n[:250], "ms": spent[n] / 1e3, "share": spent[n] / total} for n in largest]


def make_model(size: str, sizes: Sizes) -> torch.nn.Module:
    """Qwen3's architecture with random weights, and the attention that the project chooses for it."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[size], tie_word_embeddings=True, max_position_embeddings=sizes.max_length, use_cache=False
    )
    is_16_bit = sizes.device == "cuda"
    attention = choose_attention("auto", config, is_16_bit)
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    with torch.device(sizes.device):  # random numbers are slow on a processor
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def settings_of(batching: str, option: str, sizes: Sizes, rows: Rows) -> dict[str, Any]:
    """The training arguments that all ways share, and those of an option: liger, compiled, or none."""
    batch_size = sizes.packed_rows if batching == "packed" else sizes.rows_per_step(rows)
    told = argparse.Namespace(rows=batch_size, rows_per_step=batch_size, device=sizes.device)
    options = {"torch_compile": option == "compiled", "use_liger_kernel": option == "liger"}
    own = {"max_steps": sizes.steps, "logging_steps": sizes.logging_steps, "learning_rate": 1e-5}
    return arguments_of(told) | own | options


def ours(model: torch.nn.Module, batching: str, option: str, sizes: Sizes, rows: Rows) -> Trainer:
    from dft.batching.plan import BatchPlan
    from dft.config.training import DFTTrainingArguments
    from dft_trainer import DFTTrainer

    settings = settings_of(batching, option, sizes, rows)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    plan = BatchPlan(batching, sizes.max_length, None, settings["per_device_train_batch_size"], 1, seed=0)
    return DFTTrainer(
        model,
        DFTTrainingArguments(**settings),
        dft_alpha=1.0,
        train_dataset=plan.training_rows(Dataset.from_list(rows), lengths),
        row_lengths=lengths,
        data_collator=plan.collator(make_tokenizer()),
    )


def trl(model: torch.nn.Module, batching: str, option: str, sizes: Sizes, rows: Rows) -> Trainer:
    if not installed("trl"):
        raise Skipped("trl is not installed")
    from trl import SFTConfig, SFTTrainer

    settings = settings_of(batching, option, sizes, rows) | {"loss_type": "dft"}
    if batching == "packed":
        settings |= {"packing": True, "packing_strategy": "bfd", "max_length": sizes.max_length}
    else:
        settings |= {"padding_free": True, "max_length": None}
    return SFTTrainer(
        model, SFTConfig(**settings), train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer()
    )


def gradient_norms(trainer: Trainer) -> dict[str, float]:
    """The least and the greatest norm of the gradients.

    Raises:
        ValueError: a norm is 0, NaN or infinite: the way computes nothing worth measuring.
    """
    norms = [record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record]
    if not norms or not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise ValueError(f"the norms of the gradients are {norms}")
    return {"grad_norm_min": min(norms), "grad_norm_max": max(norms)}


def measured(trainer: Trainer, sizes: Sizes) -> dict[str, Any]:
    """Trains and measures the steps between the first ones and the last."""
    flops = ModelFlops(trainer.model)
    last = sizes.steps - 1  # is profiled
    clock, counted = Clock(sizes.warm, last), Counted(trainer.data_collator)
    profiled = ProfiledStep(last, sizes.device)
    trainer.data_collator = counted
    trainer.add_callback(clock)
    trainer.add_callback(profiled)
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = clock.seconds
    tokens, supervised, pairs, positions = map(int, np.array(counted.counts[sizes.warm : last]).sum(0))
    tflops = flops(tokens, supervised, pairs) / seconds / 1e12
    result: dict[str, Any] = {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / (last - sizes.warm)}
    result |= {"tokens": tokens, "padding": 1 - tokens / positions, "tflops": tflops}
    if sizes.device == "cuda":
        peak = peak_tflops_of(torch.cuda.get_device_name())
        result["mfu"] = tflops / peak if peak else "skipped: the peak of this GPU is not known"
        result["memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        result["mfu"] = NO_CUDA
        result["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return result | gradient_norms(trainer) | {"first_loss": losses[0], "costs": profiled.costs}


class Worker:
    """Measures items, each with a model of its own."""

    def __init__(self, is_tiny: bool):
        self.sizes = Sizes(is_tiny)

    def __call__(self, item: str) -> dict[str, Any]:
        size, _, way = item.partition("/")
        project, _, name = way.partition("_")
        batching, _, option = name.partition("-")
        if option == "liger" and not installed("liger-kernel"):
            raise Skipped("liger-kernel is not installed")
        sizes = self.sizes
        num_tokens = int(1.1 * sizes.steps * sizes.packed_rows * sizes.max_length)
        rows = chat_rows(num_tokens, SHAPES[size]["vocab_size"], sizes.max_length)
        gc.collect()
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
        model = make_model(size, sizes)
        trainer = {"ours": ours, "trl": trl}[project](model, batching, option, sizes, rows)
        result = measured(trainer, sizes)
        return result | {"attention": model.config._attn_implementation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", nargs="+")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    serve(args.items, Worker(args.tiny))


if __name__ == "__main__":
    main()
