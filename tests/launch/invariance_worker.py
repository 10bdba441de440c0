"""Started by test_invariance.py on one or two processes: runs all cases of an engine, or those that are named.

    torchrun --nproc-per-node 2 tests/launch/invariance_worker.py OUT --engine zero3
    torchrun --nproc-per-node 2 tests/launch/invariance_worker.py OUT --case "ddp, half a batch"

With plain SGD the change of the weights is the gradient. For every case rank 0 writes OUT/CASE.pt:
{"gradient": [P] float32, "train": log record, "eval": log record, "ends": the message of each rank that was ended by a
gradient that isn't finite}, or {"error": message} where it was refused.
"""

import argparse
import copy
import gc
import json
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedModel

from dft.batching.collators import FlatteningCollator
from dft.batching.packing import PackedRows, best_fit_decreasing
from dft.batching.sampler import token_lengths
from dft.batching.varlen_attention import register
from dft.config.adapters import AdapterConfig
from dft.config.training import DFTTrainingArguments
from dft.distributed import gather_in_training
from dft.loss.from_logits import count_terms
from dft.model.adapters import quantization, with_adapters
from dft.program import program, rank_and_world_size
from dft_trainer import DFTTrainer
from examples.make_tiny_model import make_model
from tests.helpers import spoil_gradient
from tests.launch.cases import CASES, Case, Engine, Head
from tests.launch.worker_data import VOCAB_SIZE, small_tokenizer, uneven_rows

LEARNING_RATE = 64.0  # so that the weights change by much more than they are rounded
GLOBAL_BATCH = 8
PACKED_TOKENS = 96  # the 8 rows are 3 packed ones, so that the second process gets a filler
CHUNK_MB = 20 * 4 * VOCAB_SIZE / 1e6  # 20 rows of logits
DS_CONFIGS = {
    "zero2": "ds_config/zero2.json",
    "zero3": "ds_config/zero3.json",
    "zero3 on four": "ds_config/zero3.json",
}


class MicroBatchMean(DFTTrainer):
    """The mutant: every micro-batch is normalized by itself, and their means are averaged."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        count = count_terms(inputs["labels"]) * self.accelerator.num_processes
        return super().compute_loss(model, inputs, return_outputs, count)


def model_with(head: Head) -> PreTrainedModel:
    model = make_model(VOCAB_SIZE, hidden_size=32, num_layers=2)
    if head == "tied":
        return model
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    model = type(model)(config)
    if head == "frozen":
        model.lm_head.requires_grad_(False)
    if head == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        fill_adapters(model)
    return model


def fill_adapters(model: PeftModel) -> None:
    """Gives adapters an effect: their second factor is zero at first."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def model_in_4_bits(args: DFTTrainingArguments) -> PeftModel:
    """Loaded as the program does it, once the arguments have said whether weights are sharded."""
    directory = Path(args.output_dir) / "base"
    with args.main_process_first():
        model_with("tied").save_pretrained(directory)
    settings = AdapterConfig(use_peft=True, lora_r=2, lora_dropout=0.0, load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(directory, **quantization(settings, args, torch.float32))
    model = with_adapters(base, settings, seed=0)
    torch.manual_seed(1)
    fill_adapters(model)
    return model


def deepspeed_config(case: Case) -> str | dict[str, Any] | None:
    """The project's configuration; for offloading, with the optimizer of these tests instead of DeepSpeed's Adam."""
    path = DS_CONFIGS.get(case.engine)
    if path is None or not case.is_offloaded:
        return path
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    places = ("offload_optimizer", "offload_param") if case.engine == "zero3" else ("offload_optimizer",)
    config["zero_optimization"] |= {place: {"device": "cpu"} for place in places}
    return config | {"zero_force_ds_cpu_optimizer": False}


def arguments(case: Case, output_dir: Path) -> DFTTrainingArguments:
    return DFTTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=case.rows,
        per_device_eval_batch_size=case.rows,
        gradient_accumulation_steps=case.micro_batches,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        deepspeed=deepspeed_config(case),
        fsdp=True if case.engine == "fsdp" else None,
        ddp_static_graph=case.is_static_graph,
        logging_steps=1,
        eval_on_start=True,
        save_strategy="no",
        report_to=["none"],
        disable_tqdm=True,
        activation_checkpointing=case.engine.startswith("zero3") or case.engine == "fsdp",
        train_sampling_strategy="sequential",
        sequence_parallel_size=case.sequence,
        on_nonfinite=case.on_nonfinite or "stop",
    )


def make_trainer(case: Case, model: PreTrainedModel, output_dir: Path) -> DFTTrainer:
    train_dataset: Dataset | PackedRows = uneven_rows(GLOBAL_BATCH).remove_columns("channel")
    collator = DataCollatorForSeq2Seq(small_tokenizer())
    if case.batching != "padded" or case.sequence > 1:
        register()
        model.set_attn_implementation("varlen")
    if case.batching != "padded":
        collator = FlatteningCollator()
    if case.batching == "packed":
        train_dataset = PackedRows(train_dataset, best_fit_decreasing(token_lengths(train_dataset), PACKED_TOKENS))
    return (MicroBatchMean if case.is_normalized_alone else DFTTrainer)(
        model,
        arguments(case, output_dir),
        dft_alpha=0.7,
        objective=case.objective,
        loss_normalization=case.normalization,
        reference_cache_dir=str(output_dir / "cache"),
        fused_loss="on" if case.is_fused else "off",
        loss_chunk_mb=CHUNK_MB,
        train_dataset=train_dataset,
        eval_dataset=uneven_rows(11, seed=1).remove_columns("channel"),
        data_collator=collator,
    )


def one_step(case: Case, output_dir: Path) -> dict[str, Any]:
    """What the case leaves on rank 0; on other ranks, nothing that counts."""
    model = model_in_4_bits(arguments(case, output_dir)) if case.head == "4 bits" else model_with(case.head)
    weights = {n: p for n, p in model.named_parameters() if case.head != "4 bits" or p.requires_grad}
    before = torch.cat([p.detach().flatten().clone() for p in weights.values()])
    trainer = make_trainer(case, model, output_dir)
    if case.on_nonfinite is not None and rank_and_world_size()[0] == 1:
        spoil_gradient(model, lambda: True)
    ended = ""
    try:
        if case.is_evaluated_first:
            trainer.evaluate()
        trainer.train()
    except FloatingPointError as error:
        ended = str(error)
    except RuntimeError as error:
        if not case.is_evaluated_first:
            raise
        return {"error": str(error)}
    ends = gather_in_training(ended)
    assert isinstance(trainer.model, FSDPModule) == (case.engine == "fsdp")  # and not DDP in its place
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.process_index > 0:
        return {}
    after = torch.cat([state[name].flatten().cpu() for name in weights])
    train, evaluation = (next((r for r in trainer.state.log_history if k in r), {}) for k in ("ce_loss", "eval_loss"))
    return {"gradient": (before - after) / LEARNING_RATE, "train": train, "eval": evaluation, "ends": ends}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--engine", choices=get_args(Engine))
    chosen.add_argument("--case", choices=CASES, nargs="+")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        if name in (args.case or ()) or case.engine == args.engine:
            print(f"case: {name}", flush=True)
            AcceleratorState._reset_state()  # the process group stays
            gc.collect()
            result = one_step(case, args.out / "trainer" / name)
            if rank_and_world_size()[0] == 0:
                torch.save(result, args.out / f"{name}.pt")


if __name__ == "__main__":
    with program():
        main()
