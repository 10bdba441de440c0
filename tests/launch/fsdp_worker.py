"""Started by test_fsdp.py on two processes: trainings under FSDP2, with checkpoints, and gone on from them.

    torchrun --nproc-per-node 2 tests/launch/fsdp_worker.py OUT

For each kind of checkpoint, OUT/KIND/whole holds a training of two steps, and OUT/KIND/resumed one that went on from
the first; both with the saved model, and trained.pt, the weights on which it was saved.
"""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from transformers import DataCollatorForSeq2Seq

from dft.config.fsdp import STATE_DICTS
from dft.config.training import DFTTrainingArguments
from dft.program import program
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.launch.worker_data import VOCAB_SIZE, small_tokenizer, uneven_rows


def make_trainer(kind: str, output_dir: Path) -> DFTTrainer:
    args = DFTTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.01,
        max_grad_norm=0.1,
        fsdp="full_shard",
        fsdp_config={"state_dict_type": kind},
        report_to=["none"],
        disable_tqdm=True,
    )
    return DFTTrainer(
        make_model(VOCAB_SIZE, hidden_size=32, num_layers=2),
        args,
        dft_alpha=0.7,
        train_dataset=uneven_rows(24),
        eval_dataset=uneven_rows(3, seed=1),
        data_collator=DataCollatorForSeq2Seq(small_tokenizer()),
    )


def train(kind: str, output_dir: Path, checkpoint: Path | None = None) -> None:
    AcceleratorState._reset_state()  # the process group stays
    trainer = make_trainer(kind, output_dir)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    weights = {name: weight.full_tensor() for name, weight in trainer.model.named_parameters()}
    if trainer.args.process_index == 0:
        torch.save(weights, output_dir / "trained.pt")


def main() -> None:
    for kind in STATE_DICTS:
        out = Path(sys.argv[1]) / kind
        train(kind, out / "whole")
        train(kind, out / "resumed", out / "whole" / "checkpoint-1")


if __name__ == "__main__":
    with program():
        main()
