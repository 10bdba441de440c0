"""Memory of a process against the tokens of a row, with and without sequence parallelism, on two CPU processes.

    python benchmarks/sequence_parallel.py            # writes benchmarks/results/sequence_parallel_cpu.md and .json
    python benchmarks/sequence_parallel.py --quick    # rows of 256 and 1,024 tokens, writes nothing

A Qwen3 model of 15 M parameters with random weights is trained for two steps of one row, under DDP: without sequence
parallelism each process has a row of its own, with it the two share one. Measured is what a process's resident memory
has grown by at its peak, from before the model is made, and the greater of the two. (PyTorch's profiler is of no use
here: it doesn't see what gloo's threads release.) The loss of both ways, for the same rows, is printed beside it. The
last line is JSON.
"""

import argparse
import json
import resource
import sys
import tempfile
from typing import Any

import psutil
import torch

from benchmarks.measuring import facts, keep, markdown_table, results_of, surroundings, tell
from benchmarks.memory_estimate import MIB, config_of

PACKAGES = ("torch", "transformers")
LENGTHS = (1024, 2048, 4096)
QUICK = (256, 1024)


def train(length: int, size: int) -> tuple[float, float]:
    """What this process has grown by in bytes, and the loss of the last step."""
    import dft_trainer  # noqa: F401  # whose libraries are not counted

    before = psutil.Process().memory_info().rss
    run = trainer(length, size)
    run.train()
    losses = [record["loss"] for record in run.state.log_history if "loss" in record]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, losses[-1]


def trainer(length: int, size: int):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from dft.batching.collators import FlatteningCollator
    from dft.batching.varlen_attention import register
    from dft.config.training import DFTTrainingArguments
    from dft_trainer import DFTTrainer

    torch.manual_seed(0)
    register()
    config = config_of("15M")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="varlen", dtype=torch.float32)
    rows = torch.randint(config.vocab_size, (8, length)).tolist()
    training = DFTTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2 * size,  # so that a step has the same four rows either way
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        sequence_parallel_size=size,
        train_sampling_strategy="sequential",
    )
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    return DFTTrainer(model, training, train_dataset=data, data_collator=FlatteningCollator())


def measure(length: int) -> dict[str, Any]:
    """Peaks in MiB and losses, without and with sequence parallelism."""
    found: dict[str, Any] = {"length": length}
    for size in (1, 2):
        worker = [__file__, "--length", str(length), "--size", str(size)]
        results = results_of(2, worker)
        found[f"peak of {size}"] = max(peak for peak, _ in results) / MIB
        found[f"loss of {size}"] = results[0][1]
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = [("tokens of a row", "alone, MiB", "shared by two, MiB", "ratio", "difference of the losses")]
    for one in results:
        alone, shared = one["peak of 1"], one["peak of 2"]
        difference = abs(one["loss of 2"] / one["loss of 1"] - 1)
        numbers = (f"{one['length']:,}", f"{alone:,.0f}", f"{shared:,.0f}", f"{shared / alone:.2f}")
        lines.append((*numbers, f"{difference:.0e}"))
    return markdown_table(lines)


def mib_per_token(results: list[dict[str, Any]], size: int) -> float:
    """The slope between the shortest and the longest rows."""
    first, last = results[0], results[-1]
    return (last[f"peak of {size}"] - first[f"peak of {size}"]) / (last["length"] - first["length"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, no results written")
    parser.add_argument("--length", type=int, help="only train with rows of so many tokens, in a process of torchrun")
    parser.add_argument("--size", type=int, default=1, help="with --length: --sequence_parallel_size")
    args = parser.parse_args()
    if args.length is not None:
        tell(train(args.length, args.size))
        return
    results = []
    for length in QUICK if args.quick else LENGTHS:
        results.append(measure(length))
        print(results[-1], file=sys.stderr, flush=True)
    slopes = [mib_per_token(results, size) for size in (1, 2)]
    about = surroundings(PACKAGES)
    text = "\n\n".join(
        [
            "# Memory of a process against the tokens of a row: results",
            facts(about),
            "Two processes, DDP, Qwen3 of 15 M parameters, float32, recomputation of activations, two steps of AdamW.",
            table(results),
            f"Each token more takes {1024 * slopes[0]:.0f} KiB alone and {1024 * slopes[1]:.0f} KiB shared: "
            f"{slopes[1] / slopes[0]:.2f} of it.",
            "Weights, gradients and optimizer are whole on each process here; ZeRO-3 divides them, too. A GPU was not "
            "at hand.",
        ]
    )
    print(text)
    if not args.quick:
        keep("sequence_parallel_cpu", text, about | {"found": results})
    print(json.dumps({"memory_per_token_shared_vs_alone": round(slopes[1] / slopes[0], 3)}))


if __name__ == "__main__":
    main()
