"""Started by test_metrics.py on one or more processes: two steps of training for each kind of batch.

    torchrun --nproc-per-node 2 tests/metrics/metrics_worker.py OUT

Kinds are padded and packed, in 1 and 8 micro-batches a step of 16 rows (or packed rows). The record of the second step
is about the weights that the first has left, so these are saved; the evaluation is about the last ones. Rank 0 writes
OUT/KIND-MICROBATCHES.json: {"train": record, "eval": record, "expected_train": …, "expected_eval": …}, and the same
for two mutants in directories of their names.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.packing import DOCUMENTS, PackedRows, best_fit_decreasing
from dft.batching.sampler import token_lengths
from dft.batching.varlen_attention import register
from dft.config.training import DFTTrainingArguments
from dft.metrics.token_sums import TokenSums
from dft.program import program
from dft_trainer import DFTTrainer
from examples.make_example_data import dialogues_zh, facts_en
from examples.make_tiny_model import make_model, make_tokenizer, strings
from tests.metrics.recomputation import recomputed

CHANNELS = ("facts", "dialogues", "rare")
ROWS_PER_STEP = 16
ALPHA = 0.6  # reached at the end of the warm-up, which is all of the two steps


class Rows(torch.utils.data.Dataset):
    """Rows of very uneven lengths, of which every fifth supervises nothing; one of the sources has few rows."""

    def __init__(self, num_rows: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for i in range(num_rows):
            # tokens in pairs: the untrained model expects the token that it has just seen
            ids = torch.randint(300, (3 + 4 * (i % 8),), generator=generator).repeat_interleave(2).tolist()
            start = len(ids) if i % 5 == 3 else len(ids) // 3
            channel = 2 if i % 11 == 7 else i % 2
            self.rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:], "channel": channel})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def train(kind: str, accumulation: int, out: Path) -> None:
    rows, held_out = Rows(90, seed=0), Rows(13, seed=1)
    tokenizer = make_tokenizer(strings(facts_en()[:20] + dialogues_zh()[:5]), vocab_size=400)
    items = PackedRows(rows, best_fit_decreasing(token_lengths(rows), 96)) if kind == "packed" else rows
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args = DFTTrainingArguments(
        output_dir=str(out / f"{kind}-{accumulation}"),
        per_device_train_batch_size=ROWS_PER_STEP // (accumulation * world_size),
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        report_to=["none"],
        disable_tqdm=True,
        activation_checkpointing=False,
        train_sampling_strategy="sequential",
    )
    model = make_model(400, hidden_size=32, num_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(15.0)  # so that it is sure of some tokens, and sure against others
    if kind == "packed":
        register()
        model.set_attn_implementation("varlen")
    trainer = DFTTrainer(
        model,
        args,
        dft_alpha=ALPHA,
        dft_alpha_warmup_ratio=1.0,
        channels=CHANNELS,
        log_entropy=True,
        train_dataset=items,
        eval_dataset=held_out,
        data_collator=FlatteningCollator() if kind == "packed" else PaddingCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    if args.process_index == 0:
        of_second_step = [items[i] for i in range(ROWS_PER_STEP, 2 * ROWS_PER_STEP)]
        documents = [row for item in of_second_step for row in item.get(DOCUMENTS, [item])]
        saved = (
            AutoModelForCausalLM.from_pretrained(Path(args.output_dir) / f"checkpoint-{step}", dtype=torch.float64)
            for step in (1, 2)
        )
        history = trainer.state.log_history
        result = {
            "train": next(r for r in history if r["step"] == 2 and "ce_loss" in r),
            "eval": next(r for r in history if "eval_ce_loss" in r),
            "expected_train": recomputed(next(saved), documents, ALPHA / 2, CHANNELS),
            "expected_eval": recomputed(next(saved), held_out, ALPHA, CHANNELS),
        }
        (out / f"{kind}-{accumulation}.json").write_text(json.dumps(result))


def take_own(sums: TokenSums, accelerator) -> list[float]:
    """A mutant: rank 0 records its own tokens."""
    values = sums.values.tolist()
    sums.values.zero_()
    return values


def add_last(sums: TokenSums, *args, add=TokenSums.add) -> None:
    """A mutant: a record is about the last micro-batch."""
    sums.values.zero_()
    add(sums, *args)


def main() -> None:
    out = Path(sys.argv[1])
    for kind in ("padded", "packed"):
        for accumulation in (1, 8):
            train(kind, accumulation, out)
    for mutant, change in (("own_rank", {"take": take_own}), ("last_batch", {"add": add_last})):
        (out / mutant).mkdir(exist_ok=True)
        with patch.multiple(TokenSums, **change):
            train("padded", 8, out / mutant)


if __name__ == "__main__":
    with program():
        main()
