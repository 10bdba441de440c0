"""The flags of the model, the data, the loss and the records: meaning, defaults, errors for values without sense."""

import difflib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from dft.data.channels import MAX_CHANNELS, Channels
from dft.data.rejection_log import DataValidation
from dft.errors import UserError
from dft.loss.fused import CHUNK_MB
from dft.reading.formats import FORMATS, ROLES


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
    data_validation: DataValidation = option(
        "standard: malformed rows stop the run, rows without anything to learn are dropped. strict: both stop. "
        "lenient: both are dropped. Whatever is dropped is counted and written to rejected.jsonl.",
        "standard",
    )
    preprocessing_num_workers: int = option("Processes that tokenize, at most one per core.", 8)
    data_cache_dir: str | None = option(
        "Where tokenized data is kept for the next run with the same files, tokenizer and settings; by default dft in "
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
    channels: Channels = option(
        "Sources with metrics of their own. file: the data files. field: what a row's field `channel` says, or its "
        f"file. auto: field where that makes 2 to {MAX_CHANNELS} sources, else file where that does, else none.",
        "auto",
    )
    log_entropy: bool = option("Add the entropy of the model's predictions, which costs a little time.", False)
    peak_tflops: float | None = option(
        "What one GPU could do at most in 16 bits, in TFLOP/s, for the metric mfu; known for common GPUs."
    )

    def __post_init__(self):
        if self.log_metrics_steps is not None and self.log_metrics_steps < 1:
            raise UserError(f"--log_metrics_steps is {self.log_metrics_steps}; it must be at least 1")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"--peak_tflops is {self.peak_tflops}; it must be above 0")
