"""Started by test_invariance.py on one or more processes: one optimizer step for each way to cut the batch.

    torchrun --nproc-per-node 2 tests/launch/invariance_worker.py OUT MODE 4x1 1x4 …

MODE is ddp, static (DDP with a static graph), zero2, zero3, accelerate (its own ZeRO-3), mutant or evaluated
(before it is trained). Behind a dash it may say what the head is: logits (the loss comes from these), untied,
lora (an adapter on the head), frozen; or what the batches are: flat (padding-free), packed. With plain SGD the
change of the weights is the gradient. For every cut BATCHxACCUMULATION rank 0 writes OUT/BATCHxACCUMULATION.pt:
{"gradient": [P] float32, "train": log record, "eval": log record}.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq

from dft.batching.collators import FlatteningCollator
from dft.batching.packing import PackedRows, best_fit_decreasing
from dft.batching.sampler import token_lengths
from dft.batching.varlen_attention import register
from dft.config.training import DFTTrainingArguments
from dft.loss.from_logits import count_terms
from dft.program import program
from dft_trainer import DFTTrainer
from examples.make_example_data import dialogues_zh, facts_en
from examples.make_tiny_model import make_model, make_tokenizer, strings

LEARNING_RATE = 64.0
GLOBAL_BATCH = 8
DS_CONFIGS = {"zero2": "ds_config/zero2.json", "zero3": "ds_config/zero3.json"}


class MicroBatchMean(DFTTrainer):
    """The mutant: every micro-batch is normalized by itself, and their means are averaged."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = count_terms(inputs["labels"]) * self.accelerator.num_processes
        return super().compute_loss(model, inputs, return_outputs, count)


class Rows(torch.utils.data.Dataset):
    """Rows of very uneven lengths; one of them supervises nothing."""

    def __init__(self, num_rows: int):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(num_rows):
            length = 5 + 9 * (i % 8)
            ids = torch.randint(300, (length,), generator=generator)
            labels = ids.clone()
            labels[: length if i == 3 else length // 3] = -100
            self.rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def make_model_with(head: str):
    """The model, and its head of that kind."""
    model = make_model(400, hidden_size=32, num_layers=2)
    if head in ("flat", "packed"):
        register()
        model.set_attn_implementation("varlen")
    if head in ("untied", "lora", "frozen"):
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        torch.manual_seed(1)
        model = type(model)(config)
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    if head == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def training_rows(head: str) -> tuple[torch.utils.data.Dataset, Callable]:
    """The rows of the step, and what makes batches of them."""
    rows, flatten = Rows(GLOBAL_BATCH), FlatteningCollator()
    if head == "packed":
        return PackedRows(rows, best_fit_decreasing(token_lengths(rows), 96)), flatten
    tokenizer = make_tokenizer(strings(facts_en()[:20] + dialogues_zh()[:5]), vocab_size=400)
    return rows, flatten if head == "flat" else DataCollatorForSeq2Seq(tokenizer)


def one_step(mode: str, batch: int, accumulation: int, out: Path) -> None:
    mode, _, head = mode.partition("-")
    train_dataset, collator = training_rows(head)
    args = DFTTrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        deepspeed=DS_CONFIGS.get(mode),
        ddp_static_graph=mode == "static",
        logging_steps=1,
        eval_on_start=True,
        save_strategy="no",
        report_to=["none"],
        disable_tqdm=True,
        activation_checkpointing=mode == "zero3",
        train_sampling_strategy="sequential",
    )
    model = make_model_with(head)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    names = [name for name, _ in model.named_parameters()]
    more = {"fused_loss": "off"} if head == "logits" else {"fused_loss": "on", "loss_chunk_mb": 20 * 4 * 400 / 1e6}
    cls = MicroBatchMean if mode == "mutant" else DFTTrainer
    trainer = cls(
        model,
        args,
        dft_alpha=0.7,
        **more,
        train_dataset=train_dataset,
        eval_dataset=Rows(11),
        data_collator=collator,
    )
    if mode == "evaluated":
        trainer.evaluate()
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if args.process_index == 0:
        after = torch.cat([state[name].flatten().cpu() for name in names])
        train, evaluation = (next(r for r in trainer.state.log_history if k in r) for k in ("ce_loss", "eval_loss"))
        result = {"gradient": (before - after) / LEARNING_RATE, "train": train, "eval": evaluation}
        torch.save(result, out / f"{batch}x{accumulation}.pt")


def main() -> None:
    out, mode = Path(sys.argv[1]), sys.argv[2]
    out.mkdir(parents=True, exist_ok=True)
    for cut in sys.argv[3:]:
        batch, accumulation = map(int, cut.split("x"))
        one_step(mode, batch, accumulation, out)


if __name__ == "__main__":
    with program():
        main()
