"""One way to train one model on the same rows, measured; started by train_step.py. Prints a line of JSON.

    {"tokens": real ones of the measured steps, "seconds": of these, "steps": how many, "loss": of the first step,
     "positions": computed in these steps, padding among them, "memory_mib": peak, "tflops": needed for them}

The first step isn't measured. tflops: see throughput.ModelFlops; the same work for all ways.
"""

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Qwen3Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dft.batching.collators import document_lengths
from dft.metrics.throughput import ModelFlops

MAX_LENGTH = 1024
SUPERVISED = 0.4  # of a row's tokens
SIZES = {  # of Qwen3's architecture
    "small": {
        "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64,
    },
    "small-152k": {  # with the vocabulary of Qwen3
        "vocab_size": 151936, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64,
    },
    "0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip


def make_rows(count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Rows as long as chats: log-normal, a median of 150 tokens, cut at 1024; supervised is the end of each."""
    rng = np.random.default_rng(0)
    rows = []
    for length in np.clip(rng.lognormal(5.0, 1.0, count), 16, MAX_LENGTH).astype(int):
        ids = rng.integers(3, vocabulary, length).tolist()
        prompt = int(length * (1 - SUPERVISED))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def make_model(size: str, attention: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES[size], tie_word_embeddings=True, max_position_embeddings=MAX_LENGTH, use_cache=False)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Counted:
    """A collator that counts what its micro-batches hold: tokens, supervised ones, pairs of a document, positions."""

    def __init__(self, collator):
        self.collator = collator
        self.counts: list[tuple[int, int, int, int]] = []

    def __call__(self, features):
        batch = self.collator(features)
        lengths = document_lengths(batch)
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        counts = int(lengths.sum()), supervised, int(lengths.square().sum()), batch["input_ids"].numel()
        self.counts.append(counts)
        return batch


class Original(Trainer):
    """The loss as the documents of the original system describe it: from all logits, in float32."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1].contiguous().float()
        flat, targets = logits.view(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
        losses = F.cross_entropy(flat, targets, reduction="none", ignore_index=-100)
        is_valid = targets != -100
        with torch.no_grad():
            p_correct = F.softmax(flat, dim=-1).gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        return (losses * p_correct)[is_valid].sum() / num_items_in_batch  # alpha = 1


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all trainers are told."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": args.rows_per_step // args.rows,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.device == "cuda",
        "activation_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "seed": 0,
    }


def ours(args: argparse.Namespace, rows: list[dict[str, list[int]]]) -> Trainer:
    from dft.batching.attention import choose_attention
    from dft.batching.plan import BatchPlan
    from dft.config.training import DFTTrainingArguments
    from dft_trainer import DFTTrainer

    batching, _, option = args.way.removeprefix("ours_").partition("-")
    attention = choose_attention("auto", Qwen3Config(), is_16_bit=args.device == "cuda")
    settings = arguments_of(args)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    settings["torch_compile"] = option == "compiled"
    if option == "grouped":
        settings["train_sampling_strategy"] = "group_by_length"
    if batching == "packed":  # as many tokens in a micro-batch and a step as the others have on average
        settings["per_device_train_batch_size"] = 1
        settings["gradient_accumulation_steps"] = max(1, round(args.rows_per_step * lengths.mean() / MAX_LENGTH))
    plan = BatchPlan(batching, MAX_LENGTH, None, settings["per_device_train_batch_size"], 1, seed=0)
    training = DFTTrainingArguments(**settings)
    return DFTTrainer(
        make_model(args.size, attention, args.device),
        training,
        dft_alpha=1.0,
        train_dataset=plan.training_rows(Dataset.from_list(rows), lengths),
        row_lengths=lengths,
        data_collator=plan.collator(make_tokenizer()),
    )


def original(args: argparse.Namespace, rows: list[dict[str, list[int]]]) -> Trainer:
    return Original(
        make_model(args.size, "sdpa", args.device),
        TrainingArguments(**arguments_of(args)),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(make_tokenizer()),
    )


def trl(args: argparse.Namespace, rows: list[dict[str, list[int]]]) -> Trainer:
    from trl import SFTConfig, SFTTrainer

    batching, _, grouped = args.way.removeprefix("trl_").partition("-")
    settings = arguments_of(args) | {"loss_type": "dft", "max_length": MAX_LENGTH}
    if grouped:
        settings["train_sampling_strategy"] = "group_by_length"
    if batching == "padding_free":
        settings |= {"padding_free": True, "max_length": None}
    elif batching == "packed":
        mean = np.mean([len(row["input_ids"]) for row in rows])
        settings |= {"packing": True, "per_device_train_batch_size": 1}
        settings["gradient_accumulation_steps"] = max(1, round(args.rows_per_step * mean / MAX_LENGTH))
    attention = "sdpa" if args.device == "cpu" else args.trl_attention
    return SFTTrainer(
        make_model(args.size, attention, args.device),
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )


def make_tokenizer():
    """Any: the rows are tokens already."""
    from examples.make_example_data import facts_en
    from examples.make_tiny_model import make_tokenizer, strings

    return make_tokenizer(strings(facts_en()[:40]), vocab_size=600)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="the first is not measured")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--rows_per_step", type=int, default=16)
    parser.add_argument("--trl_attention", default="sdpa")
    args = parser.parse_args()
    rows = make_rows(args.steps * args.rows_per_step, SIZES[args.size]["vocab_size"])
    if args.way == "original_1":  # the micro-batches of its README
        args.rows = 1
    make = {"ours": ours, "original": original, "trl": trl}[args.way.partition("_")[0]]
    trainer = make(args, rows)
    flops = ModelFlops(trainer.model)
    clock, counted = Clock(), Counted(trainer.data_collator)
    trainer.add_callback(clock)
    trainer.data_collator = counted
    trainer.train()
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    measured = np.array(counted.counts[trainer.args.gradient_accumulation_steps :])
    tokens, supervised, pairs, positions = map(int, measured.sum(0))
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    result = {
        "tokens": tokens,
        "positions": positions,
        "all_tokens": sum(counts[0] for counts in counted.counts),
        "seconds": clock.ends[-1] - clock.ends[0],
        "steps": len(clock.ends) - 1,
        "loss": losses[0],
        "memory_mib": memory,
        "tflops": flops(tokens, supervised, pairs) / 1e12,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
