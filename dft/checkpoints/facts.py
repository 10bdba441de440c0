"""What a run is made with: what decides its steps, as the manifest of each of its checkpoints has it."""

import json
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, TrainingArguments

from dft.batching.plan import BatchPlan
from dft.batching.stages import StagePlan
from dft.config.loss import LossConfig
from dft.config.training import num_batches_at_once
from dft.digest import digest_of_rows

SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_local_experts"),
)
WHERE_COMPUTED = ("fused_loss", "loss_chunk_mb", "reference_cache_dir")  # settings of the loss that don't change it


def run_facts(
    args: TrainingArguments,
    loss: LossConfig,
    config: PretrainedConfig,
    rows: Dataset | None,
    plan: BatchPlan | None = None,
    stages: StagePlan | None = None,
) -> dict[str, Any]:
    """What decides which rows a step trains on, with which objective and how, as JSON values by name.

    Args:
        config: of the model.
        rows: the training rows, before they are packed; None if they have no order that could be compared.
        plan: how the rows become batches; without one, by the arguments.
        stages: of the training; None if it has none.
    """
    shape = config.get_text_config().to_dict()
    objective = {name: value for name, value in asdict(loss).items() if name not in WHERE_COMPUTED}
    objective["objective_args"] = loss.objective_arguments
    facts = {
        **({} if rows is None else {"training_rows": len(rows), "content_of_rows": digest_of_rows(rows)}),
        **_batch_facts(args, plan),
        "stages": None if stages is None else stages.facts,
        **objective,
        "use_simple_dft": loss.alpha > 0,
        "dft_alpha": loss.alpha,
        **{name: shape[name] for name in SHAPE if shape.get(name) is not None},
        **_optimizer_facts(args),
        "seed": args.seed,
        **engine_facts(args),
    }
    return json.loads(json.dumps(facts))


def _batch_facts(args: TrainingArguments, plan: BatchPlan | None) -> dict[str, Any]:
    """A step is the same whether its rows are divided over processes or over micro-batches."""
    if plan is None:
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_batches_at_once(args)
        seed = args.seed if args.data_seed is None else args.data_seed
        return {"rows_per_step": rows_per_step, "sampling_strategy": args.train_sampling_strategy, "data_seed": seed}
    return {
        "batching": plan.batching,
        "max_length": plan.max_length,
        "max_tokens_per_batch": plan.max_tokens,
        "rows_per_step": plan.rows_per_batch * plan.batches_per_step,
        "sampling_strategy": plan.strategy,
        "data_seed": plan.seed,
    }


def _optimizer_facts(args: TrainingArguments) -> dict[str, Any]:
    """The optimizer, its learning rate and what that follows."""
    names = ("optim", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay")
    names += ("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
    values = vars(args)
    length = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    return {name: values[name] for name in names} | {"max_steps": None, "num_train_epochs": None} | length


def engine_facts(args: TrainingArguments) -> dict[str, Any]:
    """What shards the training and writes its checkpoints, and on how many processes."""
    plugin = args.deepspeed_plugin
    fsdp = args.fsdp_plugin_args["state_dict_type"] if args.fsdp_plugin_args else None
    engine = "deepspeed" if plugin is not None else "fsdp" if fsdp else "torch"
    zero_stage = None if plugin is None else plugin.zero_stage
    return {"world_size": args.world_size, "engine": engine, "zero_stage": zero_stage, "fsdp": fsdp}
