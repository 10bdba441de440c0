"""The training flags: those of transformers, those of its older versions, and how batches are made."""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from dft.config.arguments import did_you_mean, option
from dft.distributed import has_accelerator, join_for_deepspeed
from dft.errors import UserError

logger = logging.getLogger(__name__)
EVALUATION_METRICS = ("acc", "ce_loss", "perplexity", "avg_p_correct", "loss")


@dataclass
class DFTTrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with the flags of older versions brought back, and a few better defaults."""

    _argument_group_name = "training"

    per_device_train_batch_size: int | None = option(
        "Rows of a micro-batch, on each GPU; by default 8, or 1 packed row. Not with --max_tokens_per_batch."
    )
    batching: Literal["padded", "padding_free", "packed"] | None = option(
        "padded: rows filled up to the longest of a micro-batch. padding_free: rows one after the other, none seeing "
        "another. packed: as that, with rows chosen that fill --max_length tokens; a packed row then counts as one. "
        "By default padding_free where attention is flash_attention_2 or varlen, else padded."
    )
    max_tokens_per_batch: int | None = option(
        "Tokens of a micro-batch, instead of --per_device_train_batch_size: as many rows as fit are put together."
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length", "batch_rebalance"] | None = option(
        "Order of the rows in each epoch. group_by_length: random, with rows of similar length in a step. By default "
        "group_by_length where rows are padded, else random."
    )
    use_liger_kernel: bool = option(
        "Liger's kernels for the layers (the loss stays ours); needs a GPU and the package liger-kernel.", False
    )
    torch_compile: bool = option("Compile the model's layers with torch.compile.", False)
    eval_strategy: str | None = option(
        "no, steps or epoch. By default, where there is evaluation data: steps if --eval_steps is given, else "
        "whenever a checkpoint is saved.",
        None,
        ("--evaluation_strategy",),
    )
    report_to: list[str] | None = option(
        "Trackers: swanlab, wandb, tensorboard and others, several at once; all that are installed; none, the default."
    )
    run_name: str | None = option("Name of the run in the trackers; a resumed run keeps it.")
    eval_steps: float | None = option("Evaluate every so many steps; below 1, a share of all steps.")
    project: str = option("Name of the project in the trackers.", "dft")
    warmup_ratio: float | None = option("Share of the steps that warm the learning rate up, from 0 to below 1.")
    logging_dir: str | None = option("Directory for the log file and TensorBoard; by default that of the output.")
    save_safetensors: bool = option("Weights are always saved as safetensors; False is an error.", True)
    activation_checkpointing: bool = option(
        "Recompute activations in the backward pass to save memory.",
        True,
        ("--enable_gradient_checkpointing", "--gradient_checkpointing"),
    )
    # the old name of the field above: set by transformers, not on the command line
    gradient_checkpointing: bool | None = field(default=None, init=False)
    disable_tqdm: bool | None = option(
        "No progress bars, but a line for each record. By default where there is no terminal."
    )
    logging_steps: float = option("Log every so many steps; below 1, a share of all steps.", 10)
    metric_for_best_model: str | None = option(
        "Evaluation metric that decides which checkpoint is the best, which --save_total_limit always keeps: eval_acc "
        "(by default), eval_ce_loss, eval_perplexity, eval_avg_p_correct."
    )
    save_total_limit: int | None = option("Checkpoints to keep: the newest and the best. By default all.")
    save_only_model: bool = option(
        "Checkpoints hold the model alone: smaller, but training can't be resumed from them.", False
    )
    resume_from_checkpoint: str | None = option(
        "Checkpoint directory to go on from; 'last' for that of --output_dir with the highest step."
    )

    def __post_init__(self):
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        self._restore_old_flags()
        self._resolve_batches()
        self._check_ranges()
        self._check_liger()
        self._check_deepspeed_file()
        if not has_accelerator():
            if self.fp16:
                raise UserError("--fp16 needs a GPU and there is none here: drop it")
            self.use_cpu = True
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            configured = join_for_deepspeed()
            if configured and self.accelerator_config is not None:
                raise UserError("--accelerator_config can't be combined with DeepSpeed on CPU: drop it")
            self.accelerator_config = configured or self.accelerator_config
        super().__post_init__()
        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise UserError(
                "--accelerator_config: dispatch_batches and split_batches take all batches to be of one size"
            )
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible but one process was started: it uses the first. Start one process per GPU "
                "(scripts/train.sh) to use all of them.",
                self.n_gpu,
            )
            self._n_gpu = 1

    def _restore_old_flags(self) -> None:
        if self.eval_strategy is None:
            self.eval_strategy = "no"
        names = [name for item in self.report_to or ["none"] for name in item.split(",") if name]
        self.report_to = names[0] if names in (["all"], ["none"]) else [n for n in names if n != "none"]
        for name in [] if isinstance(self.report_to, str) else self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                hint = did_you_mean(name, INTEGRATION_TO_CALLBACK) or f"; known: {', '.join(INTEGRATION_TO_CALLBACK)}"
                raise UserError(f"--report_to: unknown tracker {name}{hint}")
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise UserError(f"--warmup_ratio is {self.warmup_ratio}; it must be at least 0 and below 1")
            if self.warmup_steps not in (0, self.warmup_ratio):
                raise UserError(f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps}: give one")
            self.warmup_steps = self.warmup_ratio  # below 1, transformers reads it as a share
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        if not self.save_safetensors:
            raise UserError("--save_safetensors False: only safetensors is written; drop the flag")
        if not self.average_tokens_across_devices:
            raise UserError(
                "--average_tokens_across_devices False: the loss is always normalized over the global batch; drop it"
            )
        if self.label_smoothing_factor:
            raise UserError(f"--label_smoothing_factor {self.label_smoothing_factor}: the DFT loss has none; drop it")

    def _resolve_batches(self) -> None:
        counted = "--max_tokens_per_batch" if self.max_tokens_per_batch else "--batching packed"
        if self.max_tokens_per_batch is not None:
            if self.max_tokens_per_batch < 1:
                raise UserError(f"--max_tokens_per_batch is {self.max_tokens_per_batch}; it must be at least 1")
            if self.per_device_train_batch_size is not None:
                raise UserError(
                    "--max_tokens_per_batch counts micro-batches in tokens, --per_device_train_batch_size in rows: "
                    "give one"
                )
        rows_have_lengths = self.max_tokens_per_batch is None and self.batching != "packed"
        if self.train_sampling_strategy not in (None, "random", "sequential") and not rows_have_lengths:
            raise UserError(
                f"--train_sampling_strategy {self.train_sampling_strategy} puts rows together by length, {counted} by "
                "how they fill a batch: drop one"
            )
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = 8 if rows_have_lengths else 1
        if self.auto_find_batch_size and self.max_tokens_per_batch is not None:
            raise UserError("--auto_find_batch_size lowers rows, --max_tokens_per_batch counts tokens: drop one")

    def _check_liger(self) -> None:
        """Liger's kernels for the layers, without its losses."""
        if not self.use_liger_kernel:
            return
        losses = ("fused_linear_cross_entropy", "cross_entropy")
        config = self.liger_kernel_config or {}
        if any(config.get(name) for name in losses):
            raise UserError(f"--liger_kernel_config: {' and '.join(losses)} would replace the DFT loss; drop them")
        if not has_accelerator() or not is_liger_kernel_available():
            raise UserError("--use_liger_kernel needs a GPU and the package liger-kernel: drop it, or install it")
        self.liger_kernel_config = config | dict.fromkeys(losses, False)

    def _check_ranges(self) -> None:
        """What transformers finds out late, or not at all."""
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 0 and below 2**32")
        backend = self.torch_compile_backend
        if backend is not None and backend.upper() not in DynamoBackend.__members__:
            known = ", ".join(name.lower() for name in DynamoBackend.__members__)
            raise UserError(f"--torch_compile_backend is {backend}; it must be one of {known}")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be above 0")
        if self.learning_rate < 0:
            raise UserError(f"--learning_rate is {self.learning_rate}; it must be at least 0")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise UserError(f"--num_train_epochs is {self.num_train_epochs}; it must be above 0")
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in EVALUATION_METRICS:
            known = ", ".join(f"eval_{name}" for name in EVALUATION_METRICS)
            raise UserError(f"--metric_for_best_model is {metric}; it must be one of {known}")
        if self.load_best_model_at_end and self.save_only_model and self.deepspeed:
            raise UserError(
                "--load_best_model_at_end can't be combined with --save_only_model under DeepSpeed: drop one"
            )

    def _check_deepspeed_file(self) -> None:
        if not isinstance(self.deepspeed, str) or self.deepspeed.startswith("{"):
            return
        path = Path(self.deepspeed)
        if not path.is_file():
            raise UserError(f"--deepspeed {path}: no such file; ds_config/ holds zero2.json, zero3.json and more")
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"--deepspeed {path} is not valid JSON: {error}") from error
