"""The training flags: those of transformers, those of its older versions, and how batches are made."""

import copy
import logging
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available

from dft.config.fsdp import fsdp_config
from dft.config.options import option
from dft.config.training_checks import (
    check_sequence_parallel,
    check_skips,
    check_training,
    check_writers,
    rows_of_batch,
    tracker_names,
)
from dft.distributed import has_accelerator, join_for_deepspeed, join_on_cpu
from dft.errors import UserError
from dft.interface import set_gloo_interface
from dft.launched import accelerate_uses
from dft.program import rank_and_world_size

logger = logging.getLogger(__name__)
TRACKERS = tuple(INTEGRATION_TO_CALLBACK)
COMPILE_BACKENDS = tuple(name.lower() for name in DynamoBackend.__members__)


@dataclass
class DFTTrainingArguments(TrainingArguments):
    """transformers.TrainingArguments with the flags of older versions brought back, and a few better defaults.

    Raises:
        UserError: a value outside its range, flags that contradict each other, or one that needs a GPU without any.
    """

    _argument_group_name = "training"

    per_device_train_batch_size: int | None = option(
        "Rows of a micro-batch, on each GPU; by default 8, or 1 packed row. Not with --max_tokens_per_batch."
    )
    batching: Literal["padded", "padding_free", "packed"] | None = option(
        "padded: rows filled up to the longest of a micro-batch. padding_free: rows one after the other, none seeing "
        "another. packed: as that, with rows chosen that fill --max_length tokens; a packed row then counts as one. "
        "By default padding_free where attention is varlen or any FlashAttention, else padded."
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
    save_total_limit: int | None = option(
        "Checkpoints to keep, at least 1. The newest and the best are always kept, even if that makes 2. By default "
        "all."
    )
    save_only_model: bool = option(
        "Checkpoints hold the model alone: smaller, but training can't be resumed from them.", False
    )
    resume_from_checkpoint: str | None = option(
        "Checkpoint directory to go on from; 'last' for the newest of --output_dir that is whole."
    )
    ddp_timeout: int = option(
        "Seconds that a process waits in a collective before it takes the others for dead. Preparing data is not "
        "limited by it; saving a checkpoint by one process is.",
        900,
    )
    sequence_parallel_size: int = option(
        "Processes that compute each micro-batch together, a part of its tokens each (DeepSpeed-Ulysses): for rows "
        "that are too long for one GPU. It must divide the number of processes, and the model's attention heads.",
        1,
    )
    fsdp: str | None = field(
        default=None,
        metadata={
            "help": "Shard weights, gradients and optimizer with FSDP2, in place of DeepSpeed: full_shard; "
            "shard_grad_op, which keeps weights whole from the forward to the backward pass; and offload, with which "
            "they are kept in the processor's memory.",
            "nargs": "?",
            "const": True,
        },
    )
    fsdp_config: dict | str | None = option(
        "JSON, or a file of it, with more settings of FSDP2, such as state_dict_type SHARDED_STATE_DICT."
    )
    resume_anyway: bool = option(
        "Go on from a checkpoint that was made with other data, batches, objective, model, learning rate or number of "
        "processes, which is refused otherwise. The learning rate and its schedule then follow the flags.",
        False,
    )
    max_runtime_minutes: float | None = option(
        "Minutes from the start of the program after which the training ends with a checkpoint, at the end of a step; "
        "the exit status is then 143."
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "What happens if the loss or the gradient of a step is NaN or infinite. stop: the run ends before the update, "
        "with an error. skip: it goes on without that update, with a warning.",
        "stop",
    )
    max_nonfinite_steps: int = option("With --on_nonfinite skip: so many such steps in a row end the run.", 5)
    do_train: bool = option(
        "False: only evaluate the model of --model_name_or_path, and write eval_results.json; nothing is trained, and "
        "no model is saved.",
        True,
    )

    def __post_init__(self):
        check_training(self, TRACKERS, COMPILE_BACKENDS)
        self._fill_in_defaults()
        self._disable_liger_losses()
        if not has_accelerator():
            if self.fp16:
                raise UserError("--fp16 needs a GPU and there is none here: drop it")
            self.use_cpu = True
        self._set_up_fsdp()
        set_gloo_interface()
        timeout = timedelta(seconds=self.ddp_timeout)
        if self.deepspeed or accelerate_uses("DEEPSPEED"):
            configured = join_for_deepspeed(timeout)
            if configured and self.accelerator_config is not None:
                raise UserError("--accelerator_config can't be combined with DeepSpeed on CPU: drop it")
            self.accelerator_config = configured or self.accelerator_config
        elif self.use_cpu and self.ddp_backend in (None, "gloo"):
            join_on_cpu(timeout)
        super().__post_init__()
        check_sequence_parallel(self)
        check_skips(self)
        check_writers(self)
        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise UserError(
                "--accelerator_config: dispatch_batches and split_batches take all batches to be of one size"
            )
        if not self.do_train and self.deepspeed_plugin is not None and self.deepspeed_plugin.zero_stage != 3:
            raise UserError(
                "--do_train False: DeepSpeed evaluates with ZeRO-3 alone; use ds_config/zero3.json, or none"
            )
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible but one process was started: it uses the first. Start one process per GPU "
                "(scripts/train.sh) to use all of them.",
                self.n_gpu,
            )
            self._n_gpu = 1

    def _fill_in_defaults(self) -> None:
        """Gives transformers what the flags mean, in its own terms."""
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.eval_strategy is None:
            self.eval_strategy = "no"
        if self.hub_token is not None:  # in the environment it is in no file that is saved, and in no message
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        names = tracker_names(self.report_to)
        self.report_to = names[0] if names in (["all"], ["none"]) else names
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio  # below 1, transformers reads it as a share
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        self.per_device_train_batch_size = rows_of_batch(self)

    def _set_up_fsdp(self) -> None:
        """Gives transformers one configuration of FSDP, with activations that its own checkpointing recomputes.

        That of accelerate's FSDP draws dropout anew when it recomputes, which makes gradients wrong.
        """
        config = fsdp_config(self)
        if config is not None and rank_and_world_size()[1] == 1:
            logger.warning("--fsdp: there is one process, and nothing to shard: it trains without FSDP")
            os.environ.pop("ACCELERATE_USE_FSDP", None)
            config = None
        self.fsdp, self.fsdp_config = None if config is None else True, config
        if config is None:
            return
        if config.get("cpu_offload") and not has_accelerator():
            raise UserError("--fsdp offload keeps weights out of a GPU, and there is none here: drop it")
        self.activation_checkpointing = config.get("activation_checkpointing", self.activation_checkpointing)
        config["activation_checkpointing"] = False
        # as accelerate's launcher does; it gives GPUs gloo beside NCCL, for what is kept in the processor's memory
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_STATE_DICT_TYPE"] = config["state_dict_type"]
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(config.get("cpu_offload", False)).lower()

    def _process_fsdp_args(self) -> dict[str, Any] | None:
        """transformers'; without its advice against recomputation by the model, which FSDP2 has no use for."""
        recomputes, self.activation_checkpointing = self.activation_checkpointing, False
        try:
            return super()._process_fsdp_args()
        finally:
            self.activation_checkpointing = recomputes

    def _disable_liger_losses(self) -> None:
        """Liger's kernels are for the layers alone: its losses would replace the DFT loss."""
        if not self.use_liger_kernel:
            return
        losses = ("fused_linear_cross_entropy", "cross_entropy")
        config = self.liger_kernel_config or {}
        if any(config.get(name) for name in losses):
            raise UserError(f"--liger_kernel_config: {' and '.join(losses)} would replace the DFT loss; drop them")
        if not has_accelerator() or not is_liger_kernel_available():
            raise UserError("--use_liger_kernel needs a GPU and the package liger-kernel: drop it, or install it")
        self.liger_kernel_config = config | dict.fromkeys(losses, False)


def sequence_parallel_size(args: TrainingArguments) -> int:
    """Processes that compute each micro-batch together; 1 for transformers' own arguments, which don't say."""
    return args.sequence_parallel_size if isinstance(args, DFTTrainingArguments) else 1


def num_batches_at_once(args: TrainingArguments) -> int:
    """Micro-batches that the processes compute at the same time."""
    return args.world_size // sequence_parallel_size(args)


def with_values(args: DFTTrainingArguments, **values: Any) -> DFTTrainingArguments:
    """A copy with other values: what was left open on the command line, decided by the model and the data."""
    decided = copy.copy(args)
    vars(decided).update(values)
    return decided
