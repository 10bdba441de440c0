"""The peak memory of whole trainings by scripts/train.sh, beside what scripts/estimate_memory.py says they take.

The models have the shapes of Qwen3 and random weights. Every row is cut at the maximum length and supervised but for
its first few tokens, and there is one row in a step: what the estimate is for.
"""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks.corpus import conversations
from benchmarks.gpu.part import Part, Skipped, has_cuda, run
from benchmarks.gpu.quickstart import environment
from benchmarks.gpu.step_way import SHAPES
from benchmarks.measuring import ROOT, installed
from dft.config.loss import CHUNK_MB
from examples.make_tiny_model import make_tokenizer
from scripts.estimate_memory import FILES, Job, Model, Setting

GIB = 2**30
STEPS, AT_ONCE = 3, 3
VOCABULARY = 500  # of the tokenizer, smaller than the models'


class Case(NamedTuple):
    """A training: the model's shapes, what is trained, and how."""

    size: str
    method: str
    setting: Setting

    @property
    def name(self) -> str:
        recomputation = f"{'' if self.setting.recompute else 'no '}recomputation"
        return f"{self.size}, {self.method}, {self.setting.name}, {recomputation}"


CASES = (
    Case("0.6b", "full", Setting(3, "none", False)),
    Case("0.6b", "full", Setting(3, "none", True)),
    Case("0.6b", "full", Setting(0, "none", True)),
    Case("0.6b", "full", Setting(2, "optimizer", True)),
    Case("0.6b", "lora", Setting(0, "none", False)),
    Case("0.6b", "qlora", Setting(0, "none", True)),
    Case("1.7b", "full", Setting(3, "none", True)),
    Case("1.7b", "qlora", Setting(0, "none", False)),
)
TINY = (Case("tiny", "full", Setting(0, "none", True)),)


def make_model(size: str, max_length: int, directory: Path) -> Path:
    """Writes a model with random weights, and a tokenizer that cuts text into small pieces."""
    config = Qwen3Config(**SHAPES[size], tie_word_embeddings=True, max_position_embeddings=max_length)
    torch.manual_seed(0)
    with torch.device("cuda" if has_cuda() else "cpu"):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    texts = (message["content"] for messages in conversations(50) for message in messages)
    make_tokenizer(texts, VOCABULARY).save_pretrained(directory)
    return directory


def make_rows(max_length: int, file: Path) -> Path:
    """Writes rows of more than max_length tokens, nearly all of them of the answer."""
    answer = "0123456789" * (max_length // 10 + 1)  # each digit is a token
    row = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}]}
    file.write_text((json.dumps(row) + "\n") * (STEPS + 1), encoding="utf-8")
    return file


def job_of(case: Case, max_length: int) -> Job:
    """What the estimate is asked for."""
    return Job(
        method=case.method,
        lora_r=16 if case.method != "full" else 0,
        gpus=1,
        sequence=1,
        max_length=max_length,
        rows=1,
        accumulation=1,
        supervised=100.0,
        chunk_mb=CHUNK_MB["cuda" if has_cuda() else "cpu"],
        dtype=None,
        bf16=True,
    )


def command(case: Case, model: Path, data: Path, out: Path, max_length: int) -> list[str]:
    """The training, as the estimate's own command line has it."""
    flags = {
        "--model_name_or_path": model,
        "--data_files": data,
        "--output_dir": out,
        "--max_length": max_length,
        "--max_steps": STEPS,
        "--per_device_train_batch_size": 1,
        "--gradient_accumulation_steps": 1,
        "--torch_dtype": "float32" if case.method == "full" and case.setting.stage == 0 else "bfloat16",
        "--bf16": True,
        "--activation_checkpointing": case.setting.recompute,
        "--validation_split_percentage": 0,
        "--save_strategy": "no",
        "--logging_steps": 1,
    }
    if case.method != "full":
        flags |= {"--use_peft": True, "--lora_r": 16}
    if case.method == "qlora":
        flags["--load_in_4bit"] = True
    return ["bash", "scripts/train.sh", *(str(word) for flag in flags.items() for word in flag)]


def peak(case: Case, model: Path, data: Path, max_length: int, part: Part) -> float | str:
    """The greatest memory that a training has told of, in GiB; or the reason why there is none."""
    out = part.out / "memory" / case.name.replace(", ", "-").replace(" ", "_")
    name = FILES[case.setting.stage, case.setting.offload]
    env = environment(part) | {
        "LAUNCHER": "deepspeed" if name else "python",
        "DS_CONFIG": f"ds_config/{name}" if name else "",
        "MASTER_PORT": str(29500 + CASES.index(case) if case in CASES else 29500),
        "LOG_DIR": str(out / "logs"),
    }
    log = out.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        words = command(case, model, data, out, max_length)
        done = subprocess.run(words, cwd=ROOT, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT)
    told = log.read_text(encoding="utf-8")
    if done.returncode != 0:
        print(told[-5000:])
        return f"failed: status {done.returncode}: " + (told.strip().splitlines() or ["no output"])[-1][:200]
    records = map(json.loads, (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines())
    shutil.rmtree(out)
    return max(record["memory_gib"] for record in records if "memory_gib" in record)


def measure(part: Part) -> None:
    if not installed("bitsandbytes"):
        raise Skipped("bitsandbytes is not installed")
    cases, max_length = (TINY, 256) if part.tiny else (CASES, 8192)
    directory = part.out / "memory"
    directory.mkdir(exist_ok=True)
    models = {size: make_model(size, max_length, directory / size) for size in dict.fromkeys(c.size for c in cases)}
    data = make_rows(max_length, directory / "rows.jsonl")
    counted = {size: Model(AutoConfig.from_pretrained(path)) for size, path in models.items()}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = {pool.submit(peak, case, models[case.size], data, max_length, part): case for case in cases}
        for done in as_completed(started):
            case, measured = started[done], done.result()
            if isinstance(measured, str):
                part.add(case.name, measured)
                continue
            expected = counted[case.size].estimate(job_of(case, max_length), case.setting).total / GIB
            part.add(case.name, {"estimate_gib": expected, "peak_gib": measured, "ratio": expected / measured})
    ratios = [found["ratio"] for found in part.measurements.values() if isinstance(found, dict)]
    if len(ratios) < len(cases):
        raise RuntimeError(f"{len(cases) - len(ratios)} of {len(cases)} trainings failed")
    part.headline(least_ratio=min(ratios), greatest_ratio=max(ratios))


if __name__ == "__main__":
    run("memory", measure)
