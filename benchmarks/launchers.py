"""The same training under every launcher, engine and method: how far its losses are from those of one process.

    python benchmarks/launchers.py            # writes benchmarks/results/launchers_cpu.md and .json, half an hour
    python benchmarks/launchers.py --quick    # 32 bits, three of the engines, writes nothing, 5 minutes
    python benchmarks/launchers.py --only "ZeRO-3" --precision bf16

A small model is trained for 20 steps of 8 rows by scripts/train.sh: all weights, LoRA adapters, and adapters on
weights in 4 bits; in float32, and with --bf16. One process of `python` accumulates 8 micro-batches of one row, the
others are two processes with 4 micro-batches each. Compared are the losses of all steps and the weights that are
written at the end. The last line is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.measuring import facts, keep, markdown_table, output_of, surroundings
from examples.make_example_data import facts_en

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
STEPS, ROWS = 20, 8
GOALS = {"float32": 1e-5, "bf16": 1e-2}
OFFLOADED = ("zero2_offload", "zero3_offload_optimizer", "zero3_offload")


@dataclass(frozen=True)
class Engine:
    """What joins the processes.

    Attributes:
        launcher: of scripts/train.sh.
        config: of DeepSpeed, in ds_config; empty for none.
    """

    name: str
    launcher: str
    config: str = ""
    flags: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        return 1 if self.launcher == "python" else 2


ONE = Engine("one process", "python")
ENGINES = (
    Engine("DDP", "torchrun"),
    Engine("DDP", "accelerate"),
    Engine("FSDP2", "accelerate", flags=("--fsdp", "full_shard")),
    *(Engine(f"ZeRO-{stage}", "deepspeed", f"zero{stage}") for stage in (1, 2, 3)),
    *(Engine("ZeRO-3", launcher, "zero3") for launcher in ("torchrun", "accelerate")),
    *(Engine(f"ZeRO-{name[4]}, {name[6:].replace('_', ' of the ', 1)}", "deepspeed", name) for name in OFFLOADED),
)
QUICK = ("DDP", "FSDP2", "ZeRO-3")
LORA = ("--use_peft", "True", "--lora_dropout", "0")
METHODS = {"all weights": (), "LoRA": LORA, "LoRA, 4 bits": (*LORA, "--load_in_4bit", "True")}
PRECISIONS = {"float32": ("--bf16", "False"), "bf16": ("--bf16", "True")}


@dataclass(frozen=True)
class Run:
    """What a training has left: a loss for each step, and the trained weights."""

    losses: list[float]
    weights: dict[str, torch.Tensor]

    @classmethod
    def read(cls, output_dir: Path) -> "Run":
        records = map(json.loads, (output_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines())
        adapter = output_dir / "adapter_model.safetensors"
        weights = load_file(adapter if adapter.exists() else output_dir / "model.safetensors")
        return cls([record["loss"] for record in records if "loss" in record], weights)

    @property
    def flat_weights(self) -> torch.Tensor:
        return torch.cat([self.weights[name].flatten().double() for name in sorted(self.weights)])

    def differences_from(self, other: "Run") -> tuple[float, float]:
        """The greatest relative difference of a loss, and the norm of the weights' difference over their norm."""
        assert len(self.losses) == len(other.losses) == STEPS
        assert self.weights.keys() == other.weights.keys()
        losses = max(abs(mine / theirs - 1) for mine, theirs in zip(self.losses, other.losses, strict=True))
        mine, theirs = (
            torch.cat([w[name].flatten().double() for name in sorted(w)]) for w in (self.weights, other.weights)
        )
        return losses, float((mine - theirs).norm() / theirs.norm())


def train(engine: Engine, method: str, precision: str, inputs: Path, output_dir: Path) -> Run:
    words = [
        *("bash", "scripts/train.sh", "--model_name_or_path", str(inputs / "model")),
        *("--data_files", str(inputs / "rows.jsonl"), "--output_dir", str(output_dir)),
        *("--dft_alpha", "0.7", "--learning_rate", "1e-3"),
        *("--torch_dtype", "float32", "--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(ROWS // engine.processes)),
        *("--validation_split_percentage", "0", "--report_to", "none", "--disable_tqdm", "True"),
        *METHODS[method],
        *PRECISIONS[precision],
        *engine.flags,
    ]
    config = f"ds_config/{engine.config}.json" if engine.config else ""
    env = {"LAUNCHER": engine.launcher, "NPROC": str(engine.processes), "DS_CONFIG": config, "OMP_NUM_THREADS": "1"}
    output_of(words, os.environ | env | {"LOG_DIR": str(output_dir)})
    return Run.read(output_dir)


def make_inputs(directory: Path) -> None:
    """A model of 1.2 M parameters with random weights, and 80 rows."""
    rows = facts_en()[:80]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output_of([sys.executable, "examples/make_tiny_model.py", str(directory / "model"), "--data", "examples/data"])


def measure(engines: list[Engine], methods: list[str], precisions: list[str], directory: Path) -> list[dict[str, Any]]:
    make_inputs(directory)
    found = []
    for precision in precisions:
        for method in methods:
            expected = train(ONE, method, precision, directory, directory / "one" / precision / method)
            for engine in engines:
                output_dir = directory / f"{engine.name} {engine.launcher}" / precision / method
                losses, weights = train(engine, method, precision, directory, output_dir).differences_from(expected)
                found.append(
                    {"engine": engine.name, "launcher": engine.launcher, "method": method, "precision": precision}
                    | {"losses": losses, "weights": weights}
                )
                print(found[-1], file=sys.stderr, flush=True)
    return found


def table(found: list[dict[str, Any]], precision: str) -> str:
    """Lines are engines under launchers, columns methods; a cell has the losses and the weights."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for one in found:
        if one["precision"] == precision:
            cell = f"{one['losses']:.0e}, {one['weights']:.0e}"
            cells.setdefault((one["engine"], one["launcher"]), {})[one["method"]] = cell
    methods = [method for method in METHODS if any(method in line for line in cells.values())]
    lines = [(engine, launcher, *(line[method] for method in methods)) for (engine, launcher), line in cells.items()]
    return markdown_table([("engine", "launcher", *methods), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three of the engines in 32 bits, no results written")
    parser.add_argument("--only", metavar="ENGINE", help="one engine, such as FSDP2; no results written")
    parser.add_argument("--precision", choices=PRECISIONS, help="one of them; no results written")
    args = parser.parse_args()
    names = [args.only] if args.only else QUICK if args.quick else [engine.name for engine in ENGINES]
    engines = [engine for engine in ENGINES if engine.name in names]
    precisions = [args.precision] if args.precision else ["float32"] if args.quick else list(PRECISIONS)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(engines, list(METHODS), precisions, Path(directory))
    about = surroundings(PACKAGES)
    greatest = {name: max(one["losses"] for one in found if one["precision"] == name) for name in precisions}
    text = "\n\n".join(
        [
            "# The same training under every launcher, engine and method: results",
            facts(about),
            f"{STEPS} steps of {ROWS} rows with AdamW, two processes over gloo against one process of `python`. The "
            "first number is the greatest relative difference of a step's loss, the second the norm of the "
            "difference of the weights written at the end over their norm.",
            *(
                f"## {name}\n\nGreatest difference of a loss: {greatest[name]:.1e}; the goal is {GOALS[name]:.0e}.\n\n"
                + table(found, name)
                for name in precisions
            ),
        ]
    )
    print(text)
    if not (args.quick or args.only or args.precision):
        keep("launchers_cpu", text, about | {"found": found})
    print(json.dumps({"greatest_difference_of_a_loss": greatest}))


if __name__ == "__main__":
    main()
