"""What ZeRO-2 and ZeRO-3 hold on two CPU processes, against one process and against the estimate of its peak.

    python benchmarks/memory_zero.py            # writes benchmarks/results/memory_zero_cpu.md and .json
    python benchmarks/memory_zero.py --quick    # the smaller model, writes nothing

A Qwen3 model with random weights is trained for two steps in float32, with buckets of 10**6 elements. At rest, before
the second step, a process holds tensors, which are counted; its peak is that and what its resident memory then grows
by within the step. (PyTorch's profiler is of no use here: it doesn't see what gloo's threads release.) Given is the
greater of two processes. The last line is JSON.
"""

import argparse
import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.measuring import facts, keep, markdown_table, results_of, surroundings, tell
from benchmarks.memory_estimate import MIB, SUPERVISED, config_of, trainer
from dft.config.loss import CHUNK_MB
from dft.model.activations import Computation, build_model, count_activations
from dft.model.memory import Batch, Zero, deepspeed_precision, estimate, model_sizes, plain_precision, read_zero

PACKAGES = ("torch", "transformers", "deepspeed")
BUCKET = 10**6  # elements
COMMON = {"overlap_comm": False, "contiguous_gradients": True, "reduce_bucket_size": BUCKET}
OF_STAGE_3 = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
ZERO: dict[str, dict[str, Any]] = {
    "one process": {},
    "ZeRO-2": COMMON | {"stage": 2, "allgather_bucket_size": BUCKET},
    "ZeRO-3": COMMON | {"stage": 3, "stage3_param_persistence_threshold": 10**4}
    | {f"stage3_{name}": BUCKET for name in OF_STAGE_3},
}  # fmt: skip
SIZES = ("15M", "45M")
ROWS, LENGTH = 2, 512
# releases go back to the system at once, so that resident memory follows the tensors
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "DS_ACCELERATOR": "cpu"}


class Measure(TrainerCallback):
    """Bytes of a process in the second step: `rest` before it, `peak` within it."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Counts the tensors at rest, and forgets the earlier peak of the resident memory."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        self.rest = sum(storages.values())
        self._resident = of_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args, state, control, **kwargs):
        """Reads the peak since then."""
        self.peak = self.rest + of_process("VmHWM") - self._resident


def tensors() -> list[torch.Tensor]:
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


def of_process(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])


def config_for(engine: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(names, "auto") | {"zero_optimization": ZERO[engine]} if ZERO[engine] else None


def train(engine: str, size: str) -> Measure:
    case = {"size": size, "rows": ROWS, "length": LENGTH, "recompute": True, "deepspeed": config_for(engine)}
    measure = Measure()
    run = trainer(case)
    run.add_callback(measure)
    run.train()
    return measure


def estimated(engine: str, size: str) -> float:
    """The estimate of the peak, in bytes."""
    config = config_of(size)
    batch = Batch(ROWS * LENGTH, round(SUPERVISED * ROWS * LENGTH), CHUNK_MB["cpu"])
    counted = count_activations(config, Computation(ROWS, LENGTH, torch.float32, False, recompute=True))
    sizes = model_sizes(build_model(config, torch.float32))
    if not ZERO[engine]:
        return estimate(sizes, counted, batch, plain_precision(torch.float32, False, False), Zero()).total
    zero = read_zero(config_for(engine), config.hidden_size)
    return estimate(sizes, counted, batch, deepspeed_precision(bf16=False), zero, gpus=2).total


def measure(engine: str, size: str) -> dict[str, Any]:
    """MiB of a process, the greater of two."""
    processes = 2 if ZERO[engine] else 1
    found = results_of(processes, [__file__, "--engine", engine, "--size", size], **ENVIRONMENT)
    rest, peak = (max(sizes) for sizes in zip(*found, strict=True))
    expected = estimated(engine, size)
    return {"engine": engine, "size": size, "rest": rest / MIB, "peak": peak / MIB, "estimate": expected / MIB}


def table(results: list[dict[str, Any]]) -> str:
    alone = {one["size"]: one for one in results if not ZERO[one["engine"]]}
    lines = [
        ("model, engine", "at rest, MiB", "of one process", "peak, MiB", "of one process", "estimate", "of the peak")
    ]
    for one in results:
        rest, peak = (one[name] / alone[one["size"]][name] for name in ("rest", "peak"))
        numbers = (
            f"{one['rest']:,.0f}",
            f"{rest:.2f}",
            f"{one['peak']:,.0f}",
            f"{peak:.2f}",
            f"{one['estimate']:,.0f}",
        )
        lines.append((f"{one['size']}, {one['engine']}", *numbers, f"{one['estimate'] / one['peak']:.3f}"))
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller model, no results written")
    parser.add_argument("--engine", choices=ZERO, help="only train with it, in a process of torchrun")
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help="with --engine: of the model")
    args = parser.parse_args()
    if args.engine is not None:
        found = train(args.engine, args.size)
        tell([found.rest, found.peak])
        return
    results = []
    for size in SIZES[:1] if args.quick else SIZES:
        for engine in ZERO:
            results.append(measure(engine, size))
            print(results[-1], file=sys.stderr, flush=True)
    about = surroundings(PACKAGES)
    text = "\n\n".join(
        [
            "# What ZeRO-2 and ZeRO-3 hold on two processes: results",
            facts(about),
            f"Float32, {ROWS} x {LENGTH} tokens, recomputation of activations, AdamW, buckets of 10**6 elements.",
            table(results),
            """\
- At rest one process holds 12 bytes of a parameter: the weight and two moments; at its peak also the gradient, 16.
  DeepSpeed holds 20, in 32 bits too: weight, gradient, two moments, and a copy of the weight, which its optimizer
  updates. ZeRO-3 divides all of it by the processes, so that two can't be below 10 / 12 = 0.83 of one at rest; four
  would hold 0.42.
- Memory outside of tensors is not counted, and what C++ alone holds at rest neither.""",
        ]
    )
    print(text)
    if not args.quick:
        keep("memory_zero_cpu", text, about | {"found": results})
    print(
        json.dumps(
            {"estimate_of_peak": {f"{r['size']}, {r['engine']}": round(r["estimate"] / r["peak"], 3) for r in results}}
        )
    )


if __name__ == "__main__":
    main()
