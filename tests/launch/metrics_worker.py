"""Started by test_records.py on one or two processes: trains two steps of each case, or of those named.

    torchrun --nproc-per-node 2 tests/launch/metrics_worker.py OUT
    torchrun --nproc-per-node 2 tests/launch/metrics_worker.py OUT "packed, 8 micro-batches"

The record of the second step is about the weights that the first has left, so these are saved; the evaluation is about
the last ones. Rank 0 writes OUT/CASE.json: {"train": record, "eval": record, "expected_train": …, "expected_eval": …}.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from dft.batching.collators import FlatteningCollator, PaddingCollator
from dft.batching.packing import DOCUMENTS, PackedRows, best_fit_decreasing
from dft.batching.sampler import token_lengths
from dft.batching.varlen_attention import register
from dft.config.training import DFTTrainingArguments
from dft.metrics.token_sums import TokenSums
from dft.program import program, rank_and_world_size
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.launch.worker_data import SOURCES, VOCAB_SIZE, small_tokenizer, uneven_rows
from tests.metrics.recomputation import recomputed

ROWS_PER_STEP = 16
ALPHA = 0.6  # reached at the end of the warm-up, which is all of the two steps


@dataclass(frozen=True)
class Case:
    """How the 16 rows (or packed rows) of a step are cut.

    Attributes:
        micro_batches: of a step, on all processes.
        mutation: methods that take the place of those of TokenSums.
    """

    batching: Literal["padded", "packed"]
    micro_batches: int
    mutation: dict[str, Callable] = field(default_factory=dict)


def take_own(sums: TokenSums, accelerator) -> list[float]:
    """A mutant: rank 0 records its own tokens."""
    values = sums.values.tolist()
    sums.values.zero_()
    return values


def add_last(sums: TokenSums, *args, add=TokenSums.add) -> None:
    """A mutant: a record is about the last micro-batch."""
    sums.values.zero_()
    add(sums, *args)


CASES = {
    "padded, 1 micro-batch": Case("padded", 1),
    "padded, 8 micro-batches": Case("padded", 8),
    "packed, 1 micro-batch": Case("packed", 1),
    "packed, 8 micro-batches": Case("packed", 8),
    "mutant of rank 0 alone": Case("padded", 8, {"take": take_own}),
    "mutant of the last micro-batch": Case("padded", 8, {"add": add_last}),
}


def confident_model(batching: str) -> PreTrainedModel:
    """A model that is sure of some tokens, and sure against others."""
    model = make_model(VOCAB_SIZE, hidden_size=32, num_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(15.0)
    if batching == "packed":
        register()
        model.set_attn_implementation("varlen")
    return model


def arguments(case: Case, output_dir: Path) -> DFTTrainingArguments:
    return DFTTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=ROWS_PER_STEP // (case.micro_batches * rank_and_world_size()[1]),
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=case.micro_batches,
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


def train(case: Case, output_dir: Path) -> dict[str, Any]:
    """The records of a run and what they should be; nothing on other ranks than 0."""
    rows, held_out, tokenizer = uneven_rows(90), uneven_rows(13, seed=1), small_tokenizer()
    is_packed = case.batching == "packed"
    items = PackedRows(rows, best_fit_decreasing(token_lengths(rows), 96)) if is_packed else rows
    trainer = DFTTrainer(
        confident_model(case.batching),
        arguments(case, output_dir),
        dft_alpha=ALPHA,
        dft_alpha_warmup_ratio=1.0,
        channels=SOURCES,
        log_entropy=True,
        train_dataset=items,
        eval_dataset=held_out,
        data_collator=FlatteningCollator() if is_packed else PaddingCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    if trainer.args.process_index > 0:
        return {}
    second_step = [items[i] for i in range(ROWS_PER_STEP, 2 * ROWS_PER_STEP)]
    documents = [row for item in second_step for row in item.get(DOCUMENTS, [item])]
    first, last = (
        AutoModelForCausalLM.from_pretrained(output_dir / f"checkpoint-{step}", dtype=torch.float64) for step in (1, 2)
    )
    history = trainer.state.log_history
    return {
        "train": next(r for r in history if r["step"] == 2 and "ce_loss" in r),
        "eval": next(r for r in history if "eval_ce_loss" in r),
        "expected_train": recomputed(first, documents, ALPHA / 2, SOURCES),
        "expected_eval": recomputed(last, held_out, ALPHA, SOURCES),
    }


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or CASES
    for name in names:
        print(f"case: {name}", flush=True)
        with ExitStack() as patches:
            for method, mutant in CASES[name].mutation.items():
                patches.enter_context(patch.object(TokenSums, method, mutant))
            result = train(CASES[name], out / name)
        if rank_and_world_size()[0] == 0:
            (out / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    with program():
        main()
