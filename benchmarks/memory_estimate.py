"""How near the estimate of a training step's memory is to its measured peak, on a CPU.

    python benchmarks/memory_estimate.py            # writes benchmarks/results/memory_estimate_cpu.md and .json
    python benchmarks/memory_estimate.py --quick    # four of the cases, under 2 minutes, writes nothing

Each case trains a Qwen3 model with random weights for two steps in a process of its own, with DFTTrainer. PyTorch's
profiler reports every allocation and every release of its CPU allocator, also those inside operators; the peak is the
greatest running sum, from before the model is made. Memory that is not a tensor is not in it, and not in the estimate.
The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from typing import Any
from unittest import mock

import torch
from transformers import Qwen3Config

from benchmarks.measuring import facts, keep, markdown_table, output_of, surroundings
from benchmarks.train_step_run import SIZES as STEP_SIZES
from dft.config.loss import CHUNK_MB
from dft.model import activations
from dft.model.activations import Computation, build_model, count_activations
from dft.model.memory import Batch, Zero, estimate, model_sizes, plain_precision

PACKAGES = ("torch", "transformers", "peft")
MIB = 2**20
SIZES = {
    "15M": {
        "vocab_size": 16000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    "45M": {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    },
}  # fmt: skip
SUPERVISED = 0.6  # of the tokens
CASES: tuple[dict[str, Any], ...] = (
    {"size": "15M", "rows": 4, "length": 512, "recompute": False},
    {"size": "15M", "rows": 4, "length": 512, "recompute": True},
    {"size": "45M", "rows": 2, "length": 512, "recompute": False},
    {"size": "45M", "rows": 2, "length": 512, "recompute": True},
    {"size": "15M", "rows": 1, "length": 1024, "recompute": False, "accumulation": 2},
    {"size": "15M", "rows": 8, "length": 128, "recompute": False},
    {"size": "45M", "rows": 2, "length": 512, "recompute": False, "lora_r": 16},
    {"size": "45M", "rows": 2, "length": 512, "recompute": True, "lora_r": 16},
)
QUICK = (0, 1, 3, 6)
GPU_PEAK = 41_458  # MiB, of 0.6b/ours_packed in benchmarks/results/gpu.md
GPU_TOKENS, GPU_SUPERVISED = 16_384, 0.64


def config_of(size: str) -> Qwen3Config:
    return Qwen3Config(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=2048, use_cache=False)


def estimated(case: dict[str, Any]) -> float:
    """The estimate of a case, in bytes."""
    config, rank = config_of(case["size"]), case.get("lora_r", 0)
    how = Computation(case["rows"], case["length"], torch.float32, False, case["recompute"], rank)
    tokens = case["rows"] * case["length"]
    batch = Batch(tokens, round(SUPERVISED * tokens), CHUNK_MB["cpu"], case.get("accumulation", 1) > 1)
    sizes = model_sizes(build_model(config, torch.float32, rank))
    precision = plain_precision(torch.float32, False, rank > 0)
    return estimate(sizes, count_activations(config, how), batch, precision, Zero()).total


def estimated_on_gpu(repeats_heads: bool) -> float:
    """The estimate for the step that was measured on a GPU, in MiB.

    Args:
        repeats_heads: as PyTorch 2.11 did, with which it was measured; from 2.13 on its kernel groups heads.
    """
    config = Qwen3Config(**STEP_SIZES["0.6b"], tie_word_embeddings=True, use_cache=False)
    how = Computation(1, GPU_TOKENS, torch.bfloat16, autocast=True, recompute=False)
    batch = Batch(GPU_TOKENS, round(GPU_SUPERVISED * GPU_TOKENS))
    with mock.patch.object(activations, "kernel_groups_heads", return_value=not repeats_heads):
        counted = count_activations(config, how)
    sizes = model_sizes(build_model(config, torch.bfloat16))
    return estimate(sizes, counted, batch, plain_precision(torch.bfloat16, True, False), Zero()).total / MIB


def train(case: dict[str, Any]) -> float:
    """The peak of a case, in bytes; in a process of its own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer(case).train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def trainer(case: dict[str, Any]):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from benchmarks.train_step_run import make_tokenizer
    from dft.batching.collators import PaddingCollator
    from dft.config.training import DFTTrainingArguments
    from dft_trainer import DFTTrainer

    torch.manual_seed(0)
    config, accumulation = config_of(case["size"]), case.get("accumulation", 1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if case.get("lora_r"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=case["lora_r"], target_modules="all-linear"))
    unsupervised = case["length"] - round(SUPERVISED * case["length"])
    ids = torch.randint(3, config.vocab_size, (2 * accumulation * case["rows"], case["length"])).tolist()
    rows = [{"input_ids": row, "labels": [-100] * unsupervised + row[unsupervised:]} for row in ids]
    training = DFTTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=case["rows"],
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=case["recompute"],
        deepspeed=case.get("deepspeed"),
    )
    collator = PaddingCollator(make_tokenizer())
    return DFTTrainer(model, training, dft_alpha=1.0, train_dataset=Dataset.from_list(rows), data_collator=collator)


def measure(number: int) -> dict[str, Any]:
    """A case with its estimate and its measured peak, in MiB."""
    command = [sys.executable, __file__, "--case", str(number)]
    peak = json.loads(output_of(command).splitlines()[-1])
    expected = estimated(CASES[number])
    return CASES[number] | {"estimate": expected / MIB, "measured": peak / MIB, "ratio": expected / peak}


def describe(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Everything that is known, for people."""
    repeated, grouped = about["gpu_estimates"]
    lines = [("model", "trained", "rows x tokens", "accumulation", "recomputation", "estimate", "measured", "ratio")]
    for one in results:
        lines.append(
            (
                one["size"],
                f"adapters, r = {one['lora_r']}" if one.get("lora_r") else "all weights",
                f"{one['rows']} x {one['length']}",
                str(one.get("accumulation", 1)),
                "yes" if one["recompute"] else "no",
                f"{one['estimate']:,.0f}",
                f"{one['measured']:,.0f}",
                f"{one['ratio']:.3f}",
            )
        )
    return "\n\n".join(
        [
            "# The estimate of a training step's memory, on a CPU: results",
            facts(about),
            "Peaks of two steps in float32 with AdamW, in MiB; the ratio is estimate / measured.",
            markdown_table(lines),
            """\
- Measured is the greatest running sum of all allocations that PyTorch's CPU allocator reports to the profiler, from
  before the model is made. It counts no memory outside of tensors: the interpreter, the libraries, holes of the
  allocator.
- Rows have the same length, so that there is no padding and no mask.""",
            "## On a GPU",
            f"""\
The training step of [gpu.md](gpu.md) (`0.6b/ours_packed`: Qwen3-0.6B's shapes, bf16 weights and moments,
{GPU_TOKENS:,} packed tokens, {GPU_SUPERVISED:.0%} of them supervised, no recomputation, one H200) had a peak of
{GPU_PEAK:,} MiB by torch.cuda.max_memory_allocated. The estimate is {repeated:,.0f} MiB, ratio
{repeated / GPU_PEAK:.3f}, for PyTorch 2.11, with which it was measured. From PyTorch 2.13 on the attention kernel
doesn't need repeated heads: {grouped:,.0f} MiB.""",
            "## Doubt",
            """\
- The table is of one process in float32; [memory_zero_cpu.md](memory_zero_cpu.md) is of ZeRO-2 and ZeRO-3.
- 4-bit weights are not measured. In 16 bits there are this peak of a GPU and three more, in [gpu.md](gpu.md).
- One architecture.""",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four of the cases, no results written")
    parser.add_argument("--case", type=int, help="only train this one, and print its peak in bytes")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(train(CASES[args.case])))
        return
    results = []
    for number in QUICK if args.quick else range(len(CASES)):
        results.append(measure(number))
        print(results[-1], file=sys.stderr, flush=True)
    about = surroundings(PACKAGES) | {"gpu_estimates": [estimated_on_gpu(repeats) for repeats in (True, False)]}
    text = describe(results, about)
    print(text)
    if not args.quick:
        keep("memory_estimate_cpu", text, about | {"found": results})
    print(json.dumps({"ratios": [round(one["ratio"], 3) for one in results]}))


if __name__ == "__main__":
    main()
