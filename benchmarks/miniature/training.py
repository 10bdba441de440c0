"""Models, trainings and exams of the study, all in this process and by DFTTrainer."""

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.miniature.tasks import END, OTHER_SKILLS, PAD, VOCABULARY, Problem
from dft.config.loss import LossConfig
from dft.config.training import DFTTrainingArguments
from dft.constants import IGNORE_INDEX
from dft_trainer import DFTTrainer

BINS = 10  # of p, and of a model's confidence


def make_model(seed: int) -> PreTrainedModel:
    """About 0.4 M random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return Qwen3ForCausalLM(config)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right, int64 [B, T] each; PaddingCollator needs a tokenizer, which there is none of here."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    width = int(lengths.max())
    batch = {
        name: torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in (("input_ids", PAD), ("labels", IGNORE_INDEX))
    }
    return batch | {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def train(
    model: PreTrainedModel,
    problems: Sequence[Problem],
    loss: LossConfig,
    rate: float,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Trains a model in place: AdamW, a warm-up of 5% of the steps and a cosine to 0."""
    with tempfile.TemporaryDirectory() as directory:
        args = DFTTrainingArguments(
            output_dir=directory,
            use_cpu=True,
            activation_checkpointing=False,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=["none"],
            disable_tqdm=True,
            seed=seed,
        )
        rows = Dataset.from_list([problem.encoded() for problem in problems])
        DFTTrainer(model, args, loss=loss, train_dataset=rows, data_collator=collate).train()


@torch.no_grad()
def answers(model: PreTrainedModel, problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """What a model makes of the answers' tokens, with the right ones before each.

    That all of them are the likeliest tokens is the same as that greedy search gives the answer and ends it.

    Returns:
        for each problem `is_right` and `ends` (the likeliest token after the right answer is the end), bool [P]; for
        each token of an answer `nll`, `p` of the right token, `confidence`, the greatest p, and `hits`, [N].
    """
    model.eval()
    names = ("is_right", "ends", "nll", "p", "confidence", "hits")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for start in range(0, len(problems), 500):
        batch = collate([problem.encoded() for problem in problems[start : start + 500]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        is_answer = labels != IGNORE_INDEX
        greatest, likeliest = logits.softmax(-1).max(-1)
        hits = likeliest == labels
        nll = cross_entropy(logits[is_answer], labels[is_answer], reduction="none")
        found["is_right"].append((hits | ~is_answer).all(1))
        found["ends"].append((hits & (labels == END)).any(1))
        found["nll"].append(nll)
        found["p"].append((-nll).exp())
        found["confidence"].append(greatest[is_answer])
        found["hits"].append(hits[is_answer])
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def calibration_error(confidence: np.ndarray, hits: np.ndarray) -> float:
    """The expected calibration error over ten bins of equal width (Guo et al. 2017, arXiv 1706.04599)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(confidence[bins == b].sum() - hits[bins == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(hits))


def examine(model: PreTrainedModel, sets: dict[str, list[Problem]]) -> dict[str, Any]:
    """The share of right answers of every set, of the other skills together (`kept`), and more of the target."""
    found = {name: answers(model, problems) for name, problems in sets.items()}
    result: dict[str, Any] = {name: float(one["is_right"].mean()) for name, one in found.items()}
    target = found["target"]
    histogram, _ = np.histogram(target["p"], bins=BINS, range=(0.0, 1.0))
    return result | {
        "kept": float(np.mean([result[name] for name in OTHER_SKILLS])),
        "ends": float(target["ends"].mean()),
        "ce": float(target["nll"].mean()),
        "calibration_error": calibration_error(target["confidence"], target["hits"]),
        "p_histogram": (histogram / histogram.sum()).round(5).tolist(),
    }
