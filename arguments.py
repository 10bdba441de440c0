"""The flags: what they mean, their defaults, and the errors for values that make no sense."""

import difflib
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from data_formats import FORMATS, ROLES
from dist_logger import UserError, get_logger
from fused_loss import CHUNK_MB
from process_group import has_accelerator, join_for_deepspeed

logger = get_logger(__name__)
EVALUATION_METRICS = ("acc", "ce_loss", "perplexity", "avg_p_correct", "loss")


def option(help: str, default: Any = None, aliases: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a help text, a default and other spellings on the command line."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = field(metadata={"help": "Model directory, or a name on the model hub."})
    model_revision: str = option("Branch, tag or commit of a model from the hub.", "main")
    torch_dtype: Literal["bfloat16", "float16", "float32", "auto"] = option(
        "Type the weights are loaded in; auto keeps that of the files.", "bfloat16", ("--dtype",)
    )
    attn_implementation: str = option(
        "auto, flash_attention_2, varlen, sdpa, eager, or another name that transformers knows. auto is "
        "flash_attention_2 where it can run, else varlen (the same kernels, from PyTorch) where the model can use it, "
        "else sdpa.",
        "auto",
    )
    attn_strict: bool = option("Stop, instead of falling back, where flash_attention_2 can't run.", False)
    trust_remote_code: bool = option("Run Python code that comes with the model. Only for sources you trust.", False)

    def __post_init__(self):
        self.model_name_or_path = os.path.expanduser(self.model_name_or_path)

    @property
    def source(self) -> dict[str, Any]:
        """What every from_pretrained is told of where the model comes from."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class DataArguments:
    _argument_group_name = "data"

    data_files: list[str] = field(
        metadata={
            "help": "Training data: files (.json, .jsonl, also as .gz and .zst; .parquet), directories, globs. "
            "PATH#N takes a random sample of N rows of each file.",
            "aliases": ["--train_data_path"],
        }
    )
    eval_data_files: list[str] | None = option(
        "Evaluation data. Without it, a share of the training data is held out.",
        None,
        ("--eval_data_path",),
    )
    data_format: Literal["auto", *FORMATS] = option(
        "Format of the rows; auto tells it for each file by its columns.", "auto"
    )
    role_map: list[str] | None = option("Other names of roles, as NAME=ROLE: human=user bot=assistant.")
    data_weights: list[float] | None = option(
        "One number for each entry of --data_files: how often its rows are seen in an epoch. 2: twice; 0.5: a random "
        "half of them once."
    )
    dedup: bool = option("Drop rows that repeat an earlier one, in any file.", False)
    drop_leaked: bool = option("Don't train on rows that have the prompt of an evaluation row.", False)
    train_on: Literal["all", "last"] = option("Assistant turns that are supervised: all, or the last of a row.", "all")
    mask_thinking: bool = option("Don't supervise thinking blocks (<think> … </think> and their like).", False)
    validation_split_percentage: float = option(
        "Share of the training rows held out for evaluation, in percent, from 0 to below 100. Not used with "
        "--eval_data_files.",
        5.0,
    )
    max_eval_samples: int | None = option("Most rows to evaluate on; 0 for no limit.", 1000)
    max_length: int = option("Longest row in tokens, see --truncation.", 8192, ("--model_max_length",))
    truncation: Literal["right", "left", "drop", "error"] = option(
        "Longer rows lose their end (right) or their beginning (left), are dropped (drop), or stop the run (error).",
        "right",
    )
    chat_template: str | None = option("File with a Jinja chat template that replaces the tokenizer's own.")
    data_validation: Literal["standard", "strict", "lenient"] = option(
        "standard: malformed rows stop the run, rows without anything to learn are dropped. strict: both stop. "
        "lenient: both are dropped. Whatever is dropped is counted and written to rejected.jsonl.",
        "standard",
    )
    preprocessing_num_workers: int = option("Processes that tokenise, at most one per core.", 8)
    data_cache_dir: str | None = option(
        "Where tokenised data is kept for the next run with the same files, tokenizer and settings; by default dft in "
        "the cache of Hugging Face's datasets."
    )
    overwrite_cache: bool = option("Prepare the data anew, whatever is in the cache.", False)
    debug_data_processing: bool = option("Log every dropped row and a sample row of each file.", False)
    dry_run: bool = option("Prepare the data, show the report and sample rows, and stop before the model.", False)

    def __post_init__(self):
        if self.max_length <= 0:
            raise UserError(f"--max_length is {self.max_length}; it must be at least 1 token")
        if not 0 <= self.validation_split_percentage < 100:
            raise UserError(
                f"--validation_split_percentage is {self.validation_split_percentage}; it must be at least 0 and "
                "below 100"
            )
        if self.max_eval_samples is not None and self.max_eval_samples < 0:
            raise UserError(f"--max_eval_samples is {self.max_eval_samples}; it must be at least 0 (0: no limit)")
        if self.data_weights and any(not 0 <= weight < math.inf for weight in self.data_weights):
            raise UserError(f"--data_weights is {self.data_weights}; each must be at least 0")
        pairs = [pair.split("=") for pair in self.role_map or []]
        if any(len(pair) != 2 or not pair[0] or pair[1] not in ROLES for pair in pairs):
            raise UserError(f"--role_map is {self.role_map}; write NAME=ROLE, with a ROLE of {', '.join(ROLES)}")
        if self.preprocessing_num_workers < 1:
            raise UserError(f"--preprocessing_num_workers is {self.preprocessing_num_workers}; it must be at least 1")

    @property
    def roles(self) -> dict[str, str]:
        """--role_map as {name: role}."""
        return dict(pair.split("=") for pair in self.role_map or [])

    @property
    def has_evaluation(self) -> bool:
        """Whether there will be rows to evaluate on."""
        return bool(self.eval_data_files) or self.validation_split_percentage > 0


@dataclass
class DFTArguments:
    _argument_group_name = "DFT loss"

    dft_alpha: float = option(
        "Weight of a token: max(floor, alpha * p_correct**gamma + 1 - alpha). 0 is plain SFT, 1 is pure DFT.", 1.0
    )
    use_simple_dft: bool = option("False switches DFT off: plain cross-entropy, as --dft_alpha 0.", True)
    dft_gamma: float = option("Power of p_correct in the weight, above 0.", 1.0)
    dft_floor: float = option("The least weight of a token, from 0 to 1.", 0.0)
    dft_alpha_warmup_ratio: float = option(
        "Share of the steps, from 0 to 1, in which alpha rises linearly from 0 (SFT) to --dft_alpha.", 0.0
    )
    dft_special_tokens: Literal["dft", "ce"] = option(
        "ce: plain cross-entropy for end-of-turn and other special tokens, so that a base model learns to stop; dft: "
        "they are weighted as all others.",
        "dft",
    )
    loss_normalization: Literal["token", "turn"] = option(
        "token: the mean over the supervised tokens of the global batch. turn: the mean over its assistant turns, "
        "each the mean over its tokens.",
        "token",
    )
    fused_loss: Literal["auto", "on", "off"] = option(
        "Compute the loss inside the model's head, without holding logits. auto: where the head is one that is known; "
        "on: stop where it isn't; off: from the model's logits.",
        "auto",
    )
    loss_chunk_mb: float | None = option(
        "MB of logits that the fused loss holds at once; by default "
        f"{CHUNK_MB['cpu']:g}, and {CHUNK_MB['cuda']:g} on GPUs."
    )

    def __post_init__(self):
        if not 0 <= self.dft_alpha <= 1:
            raise UserError(f"--dft_alpha is {self.dft_alpha}; it must be between 0 (SFT) and 1 (pure DFT)")
        if not 0 < self.dft_gamma < float("inf"):
            raise UserError(f"--dft_gamma is {self.dft_gamma}; it must be above 0")
        for name in ("dft_floor", "dft_alpha_warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.loss_chunk_mb is not None and not 0 < self.loss_chunk_mb < float("inf"):
            raise UserError(f"--loss_chunk_mb is {self.loss_chunk_mb}; it must be above 0")

    @property
    def alpha(self) -> float:
        """The alpha that the loss uses."""
        return self.dft_alpha if self.use_simple_dft else 0.0


@dataclass
class LoggingArguments:
    _argument_group_name = "logging"

    reduce_logging: bool = option("Only rank 0 speaks, but for errors. False: every rank speaks.", True)
    log_metrics_steps: int | None = option(
        "Add the DFT metrics (ce_loss, p_correct, accuracy) only to records at least this many steps apart; "
        "by default to every record (--logging_steps)."
    )

    peak_tflops: float | None = option(
        "What one GPU could do at most in 16 bits, in TFLOP/s, for the metric mfu; known for common GPUs."
    )

    def __post_init__(self):
        if self.log_metrics_steps is not None and self.log_metrics_steps < 1:
            raise UserError(f"--log_metrics_steps is {self.log_metrics_steps}; it must be at least 1")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"--peak_tflops is {self.peak_tflops}; it must be above 0")


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
    report_to: list[str] | None = option("Trackers: swanlab, wandb, tensorboard, all or none; several at once.")
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
    resume_from_checkpoint: str | None = option("Checkpoint directory to go on from; 'last' for the newest.")

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
                "--average_tokens_across_devices False: the loss is always normalised over the global batch; drop it"
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
