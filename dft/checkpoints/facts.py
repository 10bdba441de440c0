"""What a run is made with, saved in its checkpoints and compared when it is resumed.

A run that goes on with other rows, batches or another loss is another run, whose order of rows and position in the
epoch mean nothing. Learning rate, length of the training, logging and saving may change.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, TrainingArguments

from dft.batching.plan import BatchPlan
from dft.config.loss import LossConfig
from dft.digest import digest_of_rows
from dft.errors import UserError

logger = logging.getLogger(__name__)

FACTS_FILE = "made_with.json"
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
) -> dict[str, Any]:
    """What decides which rows a step trains on, and with which objective, as JSON values by name.

    Args:
        config: of the model.
        rows: the training rows, before they are packed; None if they have no order that could be compared.
        plan: how the rows become batches; without one, by the arguments.
    """
    shape = config.get_text_config().to_dict()
    plugin = args.deepspeed_plugin
    objective = {name: value for name, value in asdict(loss).items() if name not in WHERE_COMPUTED}
    objective["objective_args"] = loss.objective_arguments
    facts = {
        **({} if rows is None else {"training_rows": len(rows), "content_of_rows": digest_of_rows(rows)}),
        **_batch_facts(args, plan),
        **objective,
        "use_simple_dft": loss.alpha > 0,
        "dft_alpha": loss.alpha,
        **{name: shape[name] for name in SHAPE if shape.get(name) is not None},
        "world_size": args.world_size,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "fsdp": args.fsdp_plugin_args["state_dict_type"] if args.fsdp_plugin_args else None,
    }
    return json.loads(json.dumps(facts))


def _batch_facts(args: TrainingArguments, plan: BatchPlan | None) -> dict[str, Any]:
    """A step is the same whether its rows are divided over processes or over micro-batches."""
    if plan is None:
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
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


def write_facts(facts: dict[str, Any], checkpoint: Path) -> None:
    """Writes made_with.json to a checkpoint, which is made if it isn't there yet."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def compare_facts(checkpoint: str | Path, now: dict[str, Any], *, go_on: bool) -> None:
    """Compares what a checkpoint was made with and what the run that goes on from it is made with.

    Args:
        now: see run_facts; only what both know of is compared.
        go_on: differences are a warning.

    Raises:
        UserError: they differ; or, whatever `go_on` says, DeepSpeed couldn't load the checkpoint.
    """
    path = Path(checkpoint) / FACTS_FILE
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        logger.info("%s doesn't say what it was made with, so the data and settings aren't compared", checkpoint)
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); without that file, nothing is compared") from error
    different = [name for name in now if name in then and then[name] != now[name]]
    if not different:
        return
    listed = "".join(f"\n  {name}: checkpoint {then[name]}, now {now[name]}" for name in different)
    what = f"{checkpoint} was made with other data or settings than this run:{listed}"
    if "world_size" in different and any(Path(checkpoint).glob("global_step*")):
        raise UserError(
            f"--resume_from_checkpoint {what}\nDeepSpeed can only load it on {then['world_size']} processes: start as "
            f"many, or begin a new run with --model_name_or_path {checkpoint}"
        )
    if not go_on:
        raise UserError(
            f"--resume_from_checkpoint {what}\nGive what the checkpoint was made with; or begin a new run with "
            f"--model_name_or_path {checkpoint}; or go on all the same with --resume_anyway True"
        )
    logger.warning("%s\nIt goes on all the same, and is not the run that it would have been", what)
