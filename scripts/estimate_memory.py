"""Estimate the memory of training a model on some GPUs, and print the command of the cheapest setting that fits.

    python scripts/estimate_memory.py /models/Qwen3-8B --gpus 8 --gpu_memory 80
    python scripts/estimate_memory.py Qwen/Qwen3-8B --gpus 1 --gpu_memory 24 --method qlora --max_length 4096

Only the model's configuration is read. See docs/scaling.md for what is counted, and how well.
"""

from dft.program import program, quiet_imports

if __name__ == "__main__":  # before the imports that this is about
    quiet_imports()

import argparse
import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import PretrainedConfig

from dft.config.loss import CHUNK_MB
from dft.config.model import ModelConfig
from dft.config.parser import string_to_bool
from dft.data.tables import aligned
from dft.errors import UserError
from dft.model.activations import Activations, Computation, build_model, count_activations
from dft.model.loading import load_config
from dft.model.memory import (
    FRAGMENTATION,
    GIB,
    Batch,
    Estimate,
    Zero,
    deepspeed_precision,
    estimate,
    model_sizes,
    plain_precision,
    read_zero,
)
from dist_logger import quiet_libraries

DS_CONFIG = Path(__file__).parent.parent / "ds_config"
FILES = {  # of a ZeRO stage and what is kept in the host's memory
    (0, "none"): None,
    (1, "none"): "zero1.json",
    (2, "none"): "zero2.json",
    (3, "none"): "zero3.json",
    (2, "optimizer"): "zero2_offload.json",
    (3, "optimizer"): "zero3_offload_optimizer.json",
    (3, "all"): "zero3_offload.json",
}
OFFLOADS = ("none", "optimizer", "all")  # each slower than the one before
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what; the flags of this program."""

    method: str
    lora_r: int
    gpus: int
    sequence: int  # GPUs that share a row
    max_length: int
    rows: int
    accumulation: int
    supervised: float  # share
    chunk_mb: float
    dtype: str | None
    bf16: bool

    @property
    def length(self) -> int:
        """Tokens of a row on one GPU."""
        return -(-self.max_length // self.sequence)


@dataclass(frozen=True)
class Setting:
    """One way to do it."""

    stage: int
    offload: str
    recompute: bool

    @property
    def cost(self) -> tuple[int, bool, int]:
        """The less, the faster: the host's memory costs the most, recomputation a third, stages communication."""
        return OFFLOADS.index(self.offload), self.recompute, self.stage

    @property
    def name(self) -> str:
        stage = f"ZeRO-{self.stage}" if self.stage else "no ZeRO"
        return stage + {"none": "", "optimizer": ", optimizer on host", "all": ", all on host"}[self.offload]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    quiet_libraries(progress_bars=False)
    config = load_config(ModelConfig(args.model, args.model_revision, trust_remote_code=args.trust_remote_code))
    card = card_bytes(args.gpu_memory)
    job = Job(
        method=args.method,
        lora_r=args.lora_r if args.method != "full" else 0,
        gpus=args.gpus,
        sequence=args.sequence_parallel_size,
        max_length=args.max_length,
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        supervised=args.supervised,
        chunk_mb=args.loss_chunk_mb,
        dtype=args.torch_dtype,
        bf16=args.bf16,
    )
    model = Model(config)
    found = {setting: model.estimate(job, setting) for setting in settings(args)}
    print(heading(model, job, card))
    print(table(found, card))
    fitting = [setting for setting, one in found.items() if one.fits(card)]
    if fitting:
        chosen = min(fitting, key=lambda setting: setting.cost)
        print(f"\n{len(fitting)} of {len(found)} settings fit. The cheapest is: {described(chosen)}.\n")
        print(launch_line(args.model, job, chosen))
    else:
        print("\n" + remedies(model, job, found, card))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory, or a name on the model hub")
    parser.add_argument("--model_revision", default="main", help="branch, tag or commit of a model from the hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--method", choices=METHODS, default="full", help="all weights, adapters, or these on 4 bits")
    parser.add_argument("--lora_r", type=int, default=16, help="rank of adapters on all linear layers but the head")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--sequence_parallel_size", type=int, default=1, help="GPUs that share the tokens of a row")
    parser.add_argument("--gpu_memory", type=float, help="GiB of each; by default those of the GPU that is here")
    parser.add_argument("--max_length", type=int, default=8192, help="tokens of the longest row")
    parser.add_argument("--per_device_train_batch_size", type=int, default=1, help="rows of a micro-batch on each GPU")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--supervised", type=float, default=100.0, help="percent of the tokens; 100 is the worst case")
    parser.add_argument("--zero_stage", choices=("0", "1", "2", "3", "all"), default="all", help="0: no DeepSpeed")
    parser.add_argument("--offload", choices=OFFLOADS, help="to the host's memory; by default what fits is looked for")
    parser.add_argument("--gradient_checkpointing", type=string_to_bool, help="recompute activations; by default both")
    parser.add_argument(
        "--torch_dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights without DeepSpeed; by default float32, or bfloat16 under adapters",
    )
    parser.add_argument("--bf16", type=string_to_bool, default=True, help="compute in bfloat16; by default True")
    parser.add_argument("--loss_chunk_mb", type=float, default=CHUNK_MB["cuda"], help="MB of logits at once")
    args = parser.parse_args(argv)
    at_least_1 = (
        *("lora_r", "gpus", "sequence_parallel_size", "max_length", "per_device_train_batch_size"),
        "gradient_accumulation_steps",
    )
    for name in at_least_1:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.gpus % args.sequence_parallel_size:
        raise UserError(
            f"--sequence_parallel_size is {args.sequence_parallel_size}; it must divide the {args.gpus} of --gpus"
        )
    for name in ("gpu_memory", "loss_chunk_mb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} is {value}; it must be above 0")
    if not 0 < args.supervised <= 100:
        raise UserError(f"--supervised is {args.supervised}; it must be above 0 and at most 100 percent")
    if not list(settings(args)):
        raise UserError(
            f"--zero_stage {args.zero_stage} with --offload {args.offload}: stages 2 and 3 offload the optimizer, "
            "and stage 3 alone the weights"
        )
    return args


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """The settings that the flags leave open."""
    recompute = (False, True) if args.gradient_checkpointing is None else (args.gradient_checkpointing,)
    for (stage, offload), recomputes in itertools.product(FILES, recompute):
        if args.zero_stage in ("all", str(stage)) and args.offload in (None, offload):
            yield Setting(stage, offload, recomputes)


def card_bytes(gib: float | None) -> float:
    """The memory of a GPU in bytes: as given, or of the GPU that is here.

    Raises:
        UserError: neither.
    """
    if gib is not None:
        return gib * GIB
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: give the GiB of one with --gpu_memory")
    return torch.cuda.get_device_properties(0).total_memory


class Model:
    """The sizes and activations of one model, each counted once."""

    def __init__(self, config: PretrainedConfig):
        self.config = config
        self.sizes = cache(self._sizes)
        self.activations = cache(self._activations)

    def _sizes(self, method: str, lora_r: int):
        return model_sizes(build_model(self.config, torch.bfloat16, lora_r), quantizes=method == "qlora")

    def _activations(self, computation: Computation) -> Activations:
        return count_activations(self.config, computation)

    def estimate(self, job: Job, setting: Setting) -> Estimate:
        """The memory of a job in one setting."""
        sizes = self.sizes(job.method, job.lora_r)
        name = FILES[setting.stage, setting.offload]
        if name is None:
            dtype, zero = getattr(torch, plain_dtype(job)), Zero()
            precision, adapter_dtype = plain_precision(dtype, job.bf16, job.lora_r > 0), torch.float32
        else:
            zero = read_zero(json.loads((DS_CONFIG / name).read_text(encoding="utf-8")), sizes.hidden)
            dtype = adapter_dtype = torch.bfloat16 if job.bf16 else torch.float32
            precision = deepspeed_precision(job.bf16)
        autocast = job.bf16 and name is None
        how = Computation(job.rows, job.length, dtype, autocast, setting.recompute, job.lora_r, adapter_dtype)
        tokens = job.rows * job.length
        supervised = max(1, round(tokens * job.supervised / 100))
        batch = Batch(tokens, supervised, job.chunk_mb, job.accumulation > 1)
        return estimate(sizes, self.activations(how), batch, precision, zero, job.gpus)


def plain_dtype(job: Job) -> str:
    """The type of the weights without DeepSpeed: 32 bits where they are updated as they are, if not told otherwise."""
    return job.dtype or ("float32" if job.method == "full" else "bfloat16")


def heading(model: Model, job: Job, card: float) -> str:
    sizes = model.sizes(job.method, job.lora_r)
    gpus = "one GPU" if job.gpus == 1 else f"each of {job.gpus} GPUs"
    if job.sequence > 1:
        gpus = f"each {job.sequence} of {job.gpus} GPUs"
    return (
        f"{model.config.model_type}, {(sizes.trained + sizes.frozen) / 1e6:,.0f} M parameters, "
        f"{sizes.trained / 1e6:,.1f} M trained; {job.rows} x {job.max_length:,} tokens on {gpus} "
        f"of {card / GIB:.1f} GiB. GiB on a GPU:\n"
    )


def table(found: dict[Setting, Estimate], card: float) -> str:
    """All settings with the parts of their memory in GiB."""
    header = ("setting", "recompute", "weights", "gradients", "optimizer", "activations", "loss head", "buckets")
    lines = [(*header, "peak", "needed", "host", "fits")]
    for setting, one in found.items():
        parts = (one.weights, one.gradients, one.optimizer, one.activations, one.loss_head, one.buckets)
        numbers = [f"{part / GIB:.1f}" for part in (*parts, one.total, one.needed, one.host)]
        recompute, fits = ("yes" if setting.recompute else "no"), ("yes" if one.fits(card) else "no")
        lines.append((setting.name, recompute, *numbers, fits))
    text = aligned(lines, num_left=2)
    text.append(
        f"peak: the most at one moment, less than the sum. needed: with {FRAGMENTATION:.0%} for fragmentation, 1 GiB "
        "for CUDA.\nhost: memory of the machine for each GPU."
    )
    return "\n".join(text)


def described(setting: Setting) -> str:
    return f"{setting.name}, {'with' if setting.recompute else 'without'} recomputation"


def launch_line(model: str, job: Job, setting: Setting) -> str:
    """The command that starts the training."""
    name = FILES[setting.stage, setting.offload]
    launcher = "deepspeed" if name else "torchrun" if job.gpus > 1 else "python"
    variables = {"MODEL": model, "DATA": "train.jsonl", "OUTPUT_DIR": "outputs/dft", "LAUNCHER": launcher}
    variables |= {"NPROC": str(job.gpus), "DS_CONFIG": f"ds_config/{name}" if name else ""}
    dtype = plain_dtype(job) if name is None else "bfloat16" if job.bf16 else "float32"
    flags = {
        "--torch_dtype": dtype,
        "--bf16": job.bf16,
        "--max_length": job.max_length,
        "--per_device_train_batch_size": job.rows,
        "--gradient_accumulation_steps": job.accumulation,
        "--activation_checkpointing": setting.recompute,
        "--loss_chunk_mb": f"{job.chunk_mb:g}",
    }
    if job.method != "full":
        flags |= {"--use_peft": True, "--lora_r": job.lora_r, "--learning_rate": "2e-4"}
    if job.method == "qlora":
        flags["--load_in_4bit"] = True
    if job.sequence > 1:
        flags["--sequence_parallel_size"] = job.sequence
    before = " ".join(f"{key}={shlex.quote(value) if value else ''}" for key, value in variables.items())
    return f"{before} \\\nbash scripts/train.sh " + " ".join(f"{key} {value}" for key, value in flags.items())


def remedies(model: Model, job: Job, found: dict[Setting, Estimate], card: float) -> str:
    """By how much the setting that needs the least doesn't fit, and what it would need with other flags."""
    least = min(found, key=lambda setting: found[setting].needed)
    needed = found[least].needed
    lines = [
        f"Nothing fits. {described(least)} needs {needed / GIB:.1f} GiB, {(needed - card) / GIB:.1f} GiB too much."
    ]
    others = {f"--gpus {2 * job.gpus}": replace(job, gpus=2 * job.gpus)}
    if job.rows > 1:
        others["--per_device_train_batch_size 1"] = replace(job, rows=1)
    if job.max_length > 1:
        others[f"--max_length {job.max_length // 2}"] = replace(job, max_length=job.max_length // 2)
    heads = model.config.get_text_config().num_attention_heads
    if job.gpus % (2 * job.sequence) == 0 and heads % (2 * job.sequence) == 0:
        more = 2 * job.sequence
        others[f"--sequence_parallel_size {more}"] = replace(job, sequence=more)
    rank = job.lora_r or 16
    others |= {
        f"--method {method}": replace(job, method=method, lora_r=rank)
        for method in METHODS[METHODS.index(job.method) + 1 :]
    }
    for change, other in others.items():
        one = model.estimate(other, least)
        lines.append(f"  with {change}: {one.needed / GIB:.1f} GiB{', which fits' if one.fits(card) else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    with program():
        main()
