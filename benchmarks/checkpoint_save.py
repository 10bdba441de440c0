"""What a save costs: Trainer's own, in place and unflushed, and ours, staged and flushed, without and with its hashes.

    pip install -e . -c constraints.txt
    python benchmarks/checkpoint_save.py            # writes benchmarks/results/checkpoint_save_cpu.md and .json
    python benchmarks/checkpoint_save.py --quick    # a small model, two rounds, writes nothing

One process saves weights and optimizer of a model to --directory; the ways follow each other in every round, after
everything that was written before is on the disk. Wall time, medians over rounds. "hashes alone" is the SHA-256 of the
same files from memory, one after the other. The last line is JSON: the share of a save that the hashes add.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from benchmarks.measuring import facts, keep, markdown_table, surroundings
from dft.checkpoints import manifest
from dft.checkpoints.manifest import describe, list_files
from dft_trainer import DFTTrainer


def make_trainer(directory: str, hidden_size: int, num_layers: int) -> DFTTrainer:
    """A trainer after its first step, so that the optimizer has something to save."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": num_layers}
    config = Qwen3Config(vocab_size=32000, num_attention_heads=8, num_key_value_heads=4, head_dim=64, **sizes)
    args = TrainingArguments(
        output_dir=directory,
        max_steps=1,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}])
    trainer = DFTTrainer(Qwen3ForCausalLM(config), args, train_dataset=rows, made_with={})
    trainer.train()
    return trainer


def size_of(path: Path) -> dict[str, int]:
    """In place of manifest.describe: an entry without a hash."""
    return {"size": path.stat().st_size}


def ways_of(trainer: DFTTrainer) -> dict[str, Callable[[], None]]:
    """The saves that are compared."""

    def unhashed() -> None:
        with mock.patch.object(manifest, "describe", size_of):
            trainer._save_checkpoint(trainer.model, None)

    return {
        "Trainer's, in place, not flushed": lambda: Trainer._save_checkpoint(trainer, trainer.model, None),
        "staged and flushed, no hashes": unhashed,
        "staged, flushed and hashed": lambda: trainer._save_checkpoint(trainer.model, None),
    }


def measure(trainer: DFTTrainer, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way in each round, and the bytes of a checkpoint."""
    found: dict[str, list[float]] = {}
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    for _ in range(rounds):
        for name, save in ways_of(trainer).items():
            os.sync()
            start = time.perf_counter()
            save()
            found.setdefault(name, []).append(time.perf_counter() - start)
            if name.endswith("hashed"):
                size = sum(list_files(checkpoint).values())
                start = time.perf_counter()
                for file in list_files(checkpoint):
                    describe(checkpoint / file)
                found.setdefault("hashes alone", []).append(time.perf_counter() - start)
            shutil.rmtree(checkpoint)
    return found, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds, no results written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where to save; by default that of temporary files")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        trainer = make_trainer(directory, *((256, 2) if args.quick else (768, 12)))
        found, size = measure(trainer, 2 if args.quick else args.rounds)
    seconds = {name: median(times) for name, times in found.items()}
    hashed, unhashed = seconds["staged, flushed and hashed"], seconds["staged and flushed, no hashes"]
    ratios = {
        "share_of_hashes": round((hashed - unhashed) / hashed, 3),
        "hashed_vs_trainer": round(hashed / seconds["Trainer's, in place, not flushed"], 3),
        "hash_gib_per_second": round(size / 2**30 / seconds["hashes alone"], 3),
    }
    lines = [("", "seconds, median", "least", "most")]
    lines += [(n, *(f"{value:.2f}" for value in (median(t), min(t), max(t)))) for n, t in found.items()]
    about = surroundings(("torch", "transformers", "accelerate"))
    what = f"A checkpoint of {size / 2**30:.2f} GiB, {len(found['hashes alone'])} rounds, wall time."
    what += f" The load average was {load:.1f} before it: other programs take cores from the hashes."
    text = "\n\n".join(["# What a save costs: results", facts(about), what, markdown_table(lines)])
    print(text)
    if not args.quick:
        keep("checkpoint_save_cpu", text, about | {"ratios": ratios, "seconds": found, "bytes": size})
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
