"""Ranges and contradictions of the training flags, checked before transformers is imported."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dft.config.answers import AnswersConfig
from dft.config.data import DataConfig
from dft.config.fsdp import fsdp_config
from dft.config.options import did_you_mean
from dft.config.stages import load_stages
from dft.constants import PADDED_TO
from dft.errors import UserError

EVALUATION_METRICS = ("acc", "ce_loss", "perplexity", "avg_p_correct", "loss", "answers/score")
OF_ANSWERS = "answers/"  # metrics of sources begin with it, too, which are known when the data is
DEFAULT_ROWS = 8  # of a micro-batch, on each device
DEFAULT_EPOCHS = 3  # transformers', which nobody has asked for


def check_training(args: Any, trackers: Collection[str], compile_backends: Collection[str]) -> None:
    """Checks the values of training.DFTTrainingArguments, as they stand on the command line.

    Args:
        args: an object with its fields.
        trackers: names that --report_to may hold.
        compile_backends: names that --torch_compile_backend may hold, in lower case.

    Raises:
        UserError: the first problem found.
    """
    _check_trackers(args, trackers)
    _check_loss(args)
    _check_batches(args)
    _check_ranges(args)
    backend = args.torch_compile_backend
    if backend is not None and backend.lower() not in compile_backends:
        raise UserError(f"--torch_compile_backend is {backend}; it must be one of {', '.join(compile_backends)}")
    _check_checkpoints(args)
    _check_deepspeed_file(args)
    fsdp_config(args)


def tracker_names(report_to: list[str] | None) -> list[str]:
    """The names in --report_to, which may be separated by spaces or commas; ["all"], or ["none"] by default."""
    names = [name for item in report_to or ["none"] for name in item.split(",") if name]
    return names if names in (["all"], ["none"]) else [name for name in names if name != "none"]


def rows_of_batch(args: Any) -> int:
    """Rows of a micro-batch on each device; 1 where it is counted in tokens or in packed rows."""
    if args.per_device_train_batch_size is not None:
        return args.per_device_train_batch_size
    return 1 if args.max_tokens_per_batch is not None or args.batching == "packed" else DEFAULT_ROWS


def check_row_fits(args: Any, data: DataConfig) -> None:
    """Raises UserError where the longest row wouldn't fit into a micro-batch that is counted in tokens."""
    room, longest = args.max_tokens_per_batch, data.max_length
    if args.batching not in ("padding_free", "packed"):
        longest = -(-longest // PADDED_TO) * PADDED_TO
    if room is not None and room < longest:
        raise UserError(
            f"--max_tokens_per_batch is {room}, but a row may have {longest} tokens: raise it, or lower --max_length"
        )


def check_stages(args: Any, data: DataConfig) -> None:
    """Raises UserError where the file of --stages isn't one, or other flags say the same in another way."""
    if data.stages is None:
        return
    stages = load_stages(data.stages)
    for flag, value in (("data_weights", data.data_weights), ("mix", data.mix)):
        if value is not None:
            raise UserError(f"--stages says how often rows are seen, and so does --{flag}: drop one")
    if args.train_sampling_strategy == "batch_rebalance":
        raise UserError("--train_sampling_strategy batch_rebalance has an order of its own, as --stages has: drop one")
    if args.auto_find_batch_size:
        raise UserError("--stages plans the rows of every step, whose number --auto_find_batch_size changes: drop one")
    if stages[0].epochs is not None and args.max_steps <= 0 and args.num_train_epochs not in (1, DEFAULT_EPOCHS):
        raise UserError(
            f"--num_train_epochs {args.num_train_epochs:g}: the stages of {data.stages} are in epochs of their own; "
            "drop the flag, or give them shares of the steps"
        )


def check_sequence_parallel(args: Any) -> None:
    """Raises UserError where the processes can't be divided into groups of --sequence_parallel_size."""
    size, num_processes = args.sequence_parallel_size, args.world_size
    if size < 1 or num_processes % size:
        raise UserError(
            f"--sequence_parallel_size is {size}; it must be at least 1 and divide the number of processes, which is "
            f"{num_processes}"
        )
    if size > 1 and args.batching == "padded":
        raise UserError(
            "--sequence_parallel_size divides rows of documents without padding: drop --batching padded, or the flag"
        )
    if size > 1 and args.train_sampling_strategy == "batch_rebalance":
        raise UserError(
            "--train_sampling_strategy batch_rebalance gives each process a batch of its own, and with "
            "--sequence_parallel_size some share one: drop one"
        )


def check_skips(args: Any) -> None:
    """Raises UserError where updates are to be skipped that are made before their gradient has been looked at."""
    if args.on_nonfinite != "skip":
        return
    if "lomo" in args.optim or "layerwise" in args.optim:
        raise UserError(
            f"--on_nonfinite skip and --optim {args.optim.value}, which updates each layer in the backward pass, when "
            "the whole gradient isn't known: drop one"
        )
    if args.deepspeed_plugin is None:
        return
    if args.deepspeed_plugin.zero_stage == 0:
        raise UserError(
            "--on_nonfinite skip: under DeepSpeed it needs ZeRO 1, 2 or 3, not 0; use ds_config/zero1.json"
        )
    for name in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
        if args.deepspeed_plugin.hf_ds_config.get_value(name, True) is False:
            raise UserError(f"--on_nonfinite skip can't be combined with {name} false in --deepspeed: drop one")


def check_writers(args: Any) -> None:
    """Raises UserError where DeepSpeed would write checkpoints in the background, after they are taken for whole."""
    if args.deepspeed_plugin is None:
        return
    for name in ("checkpoint.writer.decoupled", "datastates_ckpt"):
        if args.deepspeed_plugin.hf_ds_config.get_value(name, False) is not False:
            raise UserError(
                f"{name} in --deepspeed has checkpoints written in the background, so that whether one is whole isn't "
                "known when the next steps begin: drop it"
            )


def check_evaluation(args: Any, data: DataConfig) -> None:
    """Raises UserError where evaluations are needed, and there is no data for them; or where one is all there is."""
    for flag, needs in (
        ("--do_train False", not args.do_train),
        ("--save_strategy best", args.save_strategy == "best"),
    ):
        if needs and not data.has_evaluation:
            raise UserError(
                f"{flag} needs evaluation data: give --eval_data_files, or a --validation_split_percentage above 0"
            )
    if args.do_train:
        return
    if args.resume_from_checkpoint not in (None, "False", "false"):
        raise UserError(
            f"--do_train False and --resume_from_checkpoint {args.resume_from_checkpoint}: to evaluate a checkpoint, "
            "give it as --model_name_or_path"
        )


def check_answers(args: Any, answers: AnswersConfig, data: DataConfig) -> None:
    """Raises UserError where the model is to be asked without rows to ask, or its score is used and it isn't asked."""
    if answers.eval_generations and not data.has_evaluation:
        raise UserError(
            f"--eval_generations {answers.eval_generations} needs evaluation data: give --eval_data_files, or a "
            "--validation_split_percentage above 0"
        )
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_").startswith(OF_ANSWERS) and not answers.eval_generations:
        raise UserError(f"--metric_for_best_model {metric} is about the model's answers: give --eval_generations")


def _check_trackers(args: Any, trackers: Collection[str]) -> None:
    names = tracker_names(args.report_to)
    for name in [] if names in (["all"], ["none"]) else names:
        if name not in trackers:
            hint = did_you_mean(name, trackers) or f"; known: {', '.join(trackers)}"
            raise UserError(f"--report_to: unknown tracker {name}{hint}")


def _check_loss(args: Any) -> None:
    """Refuses what would change the loss, or how it is divided."""
    if args.warmup_ratio is not None:
        if not 0 <= args.warmup_ratio < 1:
            raise UserError(f"--warmup_ratio is {args.warmup_ratio}; it must be at least 0 and below 1")
        if args.warmup_steps not in (0, args.warmup_ratio):
            raise UserError(f"--warmup_ratio {args.warmup_ratio} and --warmup_steps {args.warmup_steps}: give one")
    if not args.save_safetensors:
        raise UserError("--save_safetensors False: only safetensors is written; drop the flag")
    if not args.average_tokens_across_devices:
        raise UserError(
            "--average_tokens_across_devices False: the loss is always normalized over the global batch; drop it"
        )
    if args.label_smoothing_factor:
        raise UserError(f"--label_smoothing_factor {args.label_smoothing_factor}: the DFT loss has none; drop it")


def _check_batches(args: Any) -> None:
    counts_tokens = args.max_tokens_per_batch is not None
    if counts_tokens:
        if args.max_tokens_per_batch < 1:
            raise UserError(f"--max_tokens_per_batch is {args.max_tokens_per_batch}; it must be at least 1")
        if args.per_device_train_batch_size is not None:
            raise UserError(
                "--max_tokens_per_batch counts micro-batches in tokens, --per_device_train_batch_size in rows: "
                "give one"
            )
    groups_rows = args.train_sampling_strategy not in (None, "random", "sequential")
    if groups_rows and (counts_tokens or args.batching == "packed"):
        counted = "--max_tokens_per_batch" if counts_tokens else "--batching packed"
        raise UserError(
            f"--train_sampling_strategy {args.train_sampling_strategy} puts rows together by length, {counted} by "
            "how they fill a batch: drop one"
        )
    if args.auto_find_batch_size and counts_tokens:
        raise UserError("--auto_find_batch_size lowers rows, --max_tokens_per_batch counts tokens: drop one")


def _check_ranges(args: Any) -> None:
    """Ranges that transformers checks late, or not at all."""
    values = vars(args)
    for name in ("seed", "data_seed"):
        if not 0 <= (values[name] or 0) < 2**32:
            raise UserError(f"--{name} is {values[name]}; it must be at least 0 and below 2**32")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name} is {values[name]}; it must be at least 1")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if (values[name] or 0) < 0:
            raise UserError(f"--{name} is {values[name]}; it must be above 0")
    if args.max_runtime_minutes is not None and not args.max_runtime_minutes > 0:
        raise UserError(f"--max_runtime_minutes is {args.max_runtime_minutes}; it must be above 0")
    if args.max_nonfinite_steps < 1:
        raise UserError(f"--max_nonfinite_steps is {args.max_nonfinite_steps}; it must be at least 1")
    if args.learning_rate < 0:
        raise UserError(f"--learning_rate is {args.learning_rate}; it must be at least 0")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(f"--num_train_epochs is {args.num_train_epochs}; it must be above 0")


def _check_checkpoints(args: Any) -> None:
    if args.eval_strategy not in (None, "no", "steps", "epoch"):
        raise UserError(f"--eval_strategy is {args.eval_strategy}; it must be one of no, steps, epoch")
    metric = args.metric_for_best_model
    name = (metric or "acc").removeprefix("eval_")
    if name not in EVALUATION_METRICS and not name.startswith(OF_ANSWERS):
        known = ", ".join(f"eval_{name}" for name in EVALUATION_METRICS)
        raise UserError(f"--metric_for_best_model is {metric}; it must be one of {known}")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise UserError(f"--save_total_limit is {args.save_total_limit}; it must be at least 1. To keep all, drop it")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise UserError("--save_strategy best needs evaluations: drop --eval_strategy no, or the flag")
    if args.load_best_model_at_end and args.save_only_model and args.deepspeed:
        raise UserError("--load_best_model_at_end can't be combined with --save_only_model under DeepSpeed: drop one")


def _check_deepspeed_file(args: Any) -> None:
    if not isinstance(args.deepspeed, str) or args.deepspeed.startswith("{"):
        return
    path = Path(args.deepspeed)
    if not path.is_file():
        raise UserError(f"--deepspeed {path}: no such file; ds_config/ holds zero2.json, zero3.json and more")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--deepspeed {path} is not valid JSON: {error}") from error
