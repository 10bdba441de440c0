"""What the machine is, and its two ceilings: how fast it copies memory and multiplies 16-bit matrices."""

import platform
import subprocess
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu.part import NO_CUDA, Part, run
from benchmarks.gpu.timing import seconds_of
from benchmarks.measuring import commit, cpu_name, installed

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "deepspeed", "trl", "liger-kernel")
PACKAGES += ("cut-cross-entropy", "flash-attn", "peft", "numpy", "pyarrow")
COMMIT = Path(__file__).parent / "COMMIT"  # in a pack, which has no git


def gpu() -> dict[str, object] | str:
    """The GPU, its driver and its memory."""
    if not torch.cuda.is_available():
        return NO_CUDA
    from dft.metrics.throughput import peak_tflops_of  # imports transformers, which takes seconds

    about = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError) as error:
        driver = f"unknown ({error})"
    return {
        "name": about.name,
        "driver": driver,
        "memory_gib": about.total_memory / 2**30,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
        "multiprocessors": about.multi_processor_count,
        "datasheet_tflops": peak_tflops_of(about.name) or "unknown",
    }


def copy_gb_per_second(size: int) -> float:
    """Bytes read and written by a copy of `size` bytes, in GB/s."""
    source = torch.empty(size, dtype=torch.uint8, device=device()).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / median(seconds_of(lambda: target.copy_(source), times=10, warm=3)) / 1e9


def product_tflops(size: int) -> float:
    """The rate of a bf16 product of two square random matrices, in TFLOP/s."""
    a, b = (torch.randn(size, size, device=device()).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / median(seconds_of(lambda: torch.mm(a, b, out=out), times=10, warm=3)) / 1e12


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(part: Part) -> None:
    part.add("gpu", gpu())
    part.add("cpu", {"name": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()})
    versions = {name: installed(name) or "not installed" for name in PACKAGES}
    part.add("versions", versions | {"cuda": torch.version.cuda or "none", "cudnn": torch.backends.cudnn.version()})
    part.add("commit", COMMIT.read_text(encoding="utf-8").strip() if COMMIT.exists() else commit())
    copied = copy_gb_per_second(2**22 if part.tiny else 2**32)
    part.add("copy", {"gb_per_second": copied, "device": device()})
    part.headline(copy_gb_per_second=copied)
    rate = product_tflops(128 if part.tiny else 8192)
    part.add("product", {"tflops": rate, "device": device()})
    part.headline(product_tflops=rate)


if __name__ == "__main__":
    run("facts", measure)
