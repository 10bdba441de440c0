"""Fine-tune a causal language model on ChatML data with the DFT loss.

    python train_dft.py --model_name_or_path MODEL --data_files data/ --output_dir out              # 1 process
    deepspeed --num_gpus 8 train_dft.py --deepspeed ds_config/zero3.json --config my_run.yaml      # 8 GPUs
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train_dft.py --deepspeed ds_config/zero3.json --config my_run.yaml                         # 8 nodes

scripts/train.sh does this with a log file; --help lists the flags, README.md explains them.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import get_last_checkpoint

from data_utils import prepare_in_cache
from dft.batching.attention import choose_attention
from dft.batching.plan import BatchPlan, choose_batching
from dft.chat.format import ChatFormat, load_chat_template
from dft.config.arguments import DataArguments, DFTArguments, ModelArguments
from dft.config.command_line import parse_args
from dft.config.training import DFTTrainingArguments
from dft.data.cache import CACHE_DIRECTORY
from dft.data.channels import Channels
from dft.data.page import write_page
from dft.data.prepared import PreparedData, load_prepared
from dft.data.report import report_table, show_row, write_report
from dft.distributed import once_per_node
from dft.errors import UserError
from dft.files import make_directory
from dft.model.tokenizer import load_tokenizer
from dft.program import program
from dft.tracking.console import print_lines, summary
from dft.tracking.curves import Curves, holds_best, plot_curves
from dft.tracking.model_card import write_card
from dft.tracking.run_info import about_run, write_run
from dft.tracking.trackers import check_trackers, guard_trackers, start_trackers
from dft.tracking.train_log import TrainLog
from dft_trainer import DFTTrainer
from dist_logger import get_logger, quiet_libraries, setup_logging

logger = get_logger("train_dft")


def main(argv: list[str] | None = None) -> None:
    """One run, from the command line `argv` (by default this program's) to the saved model."""
    model_args, data_args, dft_args, logging_args, args = parse_args(argv)
    make_directory(args.output_dir, "--output_dir")
    log_dir = make_directory(args.logging_dir or args.output_dir, "--logging_dir")
    debug = data_args.debug_data_processing
    setup_logging(log_dir / "train_distributed.log", only_rank_0=logging_args.reduce_logging, debug=debug)
    quiet_libraries(progress_bars=not args.disable_tqdm)
    checkpoint, steps_done = find_checkpoint(args)
    trackers = {} if data_args.dry_run else check_trackers(args)
    tokenizer = make_tokenizer(model_args, data_args)
    config = load_config(model_args, tokenizer)
    attention = choose_attention(
        model_args.attn_implementation, config, attends_in_16_bits(model_args, args, config), model_args.attn_strict
    )
    plan = plan_batches(data_args, args, config, attention)
    data = load_data(data_args, args, tokenizer, plan, logging_args.channels)
    if data_args.dry_run:
        return
    groups = {"model": model_args, "data": data_args, "dft": dft_args, "logging": logging_args}
    about = describe_run(groups, args, data)
    args.report_to = start_trackers(args, trackers, about, steps_done)
    model = load_model(model_args, args, config, attention)
    curves = Curves(args.output_dir)

    trainer = DFTTrainer(
        model,
        args,
        **loss_settings(dft_args, tokenizer),
        source_of_row=data.source_of,
        log_metrics_steps=logging_args.log_metrics_steps,
        row_lengths=data.lengths,
        peak_tflops=logging_args.peak_tflops,
        channels=data.channels,
        log_entropy=logging_args.log_entropy,
        data_collator=plan.collator(tokenizer),
        train_dataset=plan.training_rows(data.train, data.lengths),
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        callbacks=[TrainLog(args.output_dir), curves],
    )
    guard_trackers(trainer)
    print_lines(trainer)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    save(trainer, result.metrics)
    if args.process_index == 0:
        plot_curves(trainer.state.log_history, curves.path)
        write_card(about, data.report, args, trainer.state)
        print(summary(trainer))


def find_checkpoint(args: DFTTrainingArguments) -> tuple[str | None, int]:
    """The checkpoint directory to resume from, or None, and its step.

    Raises:
        UserError: there is none, or it holds the model alone.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        if Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir):
            logger.warning(
                "%s holds checkpoints of an earlier run, which count towards --save_total_limit, and which "
                "--resume_from_checkpoint last would go on from, where they are further than this run's. To keep that "
                "run: another --output_dir",
                args.output_dir,
            )
        return None, 0
    if wanted.lower() in ("last", "true"):
        wanted = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if wanted is None:
            raise UserError(
                f"--resume_from_checkpoint: no checkpoint in {args.output_dir}; drop the flag to start anew"
            )
    path = Path(wanted)
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume_from_checkpoint {path}: not a whole checkpoint (trainer_state.json: {error})"
        ) from error
    if not any(path.glob("optimizer*")) and not any(path.glob("global_step*")):
        raise UserError(
            f"--resume_from_checkpoint {path}: it holds the model alone (--save_only_model). Start a new run from it "
            f"with --model_name_or_path {path}"
        )
    # Trainer would train one step more, or none and write empty results
    step, epoch = state.get("global_step", 0), state.get("epoch") or 0.0
    if step >= args.max_steps if args.max_steps > 0 else epoch >= args.num_train_epochs:
        raise UserError(
            f"--resume_from_checkpoint {path}: nothing is left to train, it is at step {step} and epoch {epoch:g}; "
            "raise --max_steps or --num_train_epochs"
        )
    logger.info("Going on from %s, which is at step %d", path, step)
    return str(path), step


def make_tokenizer(model_args: ModelArguments, data_args: DataArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the chat template that was asked for.

    Raises:
        UserError: there is no such model, or no tokenizer with it.
    """
    name = model_args.model_name_or_path
    is_hub_name = "/" not in name or (name.count("/") == 1 and not Path(name).parent.is_dir())
    if not Path(name).exists() and (name.startswith(".") or not is_hub_name):
        raise UserError(f"--model_name_or_path {name}: no such directory, and not a name on the model hub")
    tokenizer = load_tokenizer(name, f"--model_name_or_path {name}", **model_args.source)
    if data_args.chat_template is not None:
        tokenizer.chat_template = load_chat_template(data_args.chat_template)
    return tokenizer


def loss_settings(dft_args: DFTArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What DFTTrainer is told of the loss."""
    return {
        "dft_alpha": dft_args.alpha,
        "dft_gamma": dft_args.dft_gamma,
        "dft_floor": dft_args.dft_floor,
        "dft_alpha_warmup_ratio": dft_args.dft_alpha_warmup_ratio,
        "plain_tokens": special_tokens(tokenizer) if dft_args.dft_special_tokens == "ce" else (),
        "loss_normalization": dft_args.loss_normalization,
        "fused_loss": dft_args.fused_loss,
        "loss_chunk_mb": dft_args.loss_chunk_mb,
    }


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of all special tokens: end of turn, end of text, padding, what else the tokenizer marks as such."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_ids)))


def plan_batches(
    data_args: DataArguments, args: DFTTrainingArguments, config: PretrainedConfig, attention: str
) -> BatchPlan:
    """How the training rows become batches."""
    plan = BatchPlan(
        choose_batching(args.batching, config, attention),
        max_length=data_args.max_length,
        max_tokens=args.max_tokens_per_batch,
        rows_per_batch=args.per_device_train_batch_size,
        batches_per_step=args.gradient_accumulation_steps * args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        strategy=args.train_sampling_strategy,
    )
    args.train_sampling_strategy, args.batching = plan.strategy, plan.batching
    return plan


def load_data(
    data_args: DataArguments,
    args: DFTTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    plan: BatchPlan,
    channels: Channels,
) -> PreparedData:
    """The training and evaluation rows, tokenized by one process of each node and read by all of them."""
    chat_format = ChatFormat(tokenizer, data_args.train_on, data_args.mask_thinking)
    logger.info("Assistant turns are found by: %s", chat_format.method)
    is_main = args.process_index == 0
    data = prepare_rows(data_args, chat_format, channels, args.seed, progress=is_main and not args.disable_tqdm)
    if is_main:
        show_data(data, data_args, args, tokenizer, plan)
    return data


def prepare_rows(
    data_args: DataArguments, chat_format: ChatFormat, channels: Channels, seed: int, progress: bool
) -> PreparedData:
    """The rows of the files, see data_utils.prepare_data, made by one process of each node."""
    prepare = partial(
        prepare_in_cache,
        data_args.data_files,
        data_args.eval_data_files,
        chat_format,
        data_format=data_args.data_format,
        role_map=data_args.roles,
        data_weights=data_args.data_weights,
        max_length=data_args.max_length,
        truncation=data_args.truncation,
        dedup=data_args.dedup,
        drop_leaked=data_args.drop_leaked,
        validation_split_percentage=data_args.validation_split_percentage,
        max_eval_samples=data_args.max_eval_samples,
        data_validation=data_args.data_validation,
        seed=seed,
        num_workers=data_args.preprocessing_num_workers,
        cache_dir=data_args.data_cache_dir or CACHE_DIRECTORY,
        overwrite_cache=data_args.overwrite_cache,
        progress=progress,
    )
    return load_prepared(once_per_node(prepare), channels)


def show_data(
    data: PreparedData,
    data_args: DataArguments,
    args: DFTTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    plan: BatchPlan,
) -> None:
    """Writes and logs what became of the data; shows a sample row of each file in a dry run or for debugging."""
    out = Path(args.output_dir)
    plan.add_to_report(data.report, data.lengths, data.training_lengths())
    write_report(data.report, out)
    shutil.copyfile(data.directory / "rejected.jsonl", out / "rejected.jsonl")
    write_page(data, tokenizer, out / "data_report.html")
    logger.info("Data: %d training and %d evaluation rows", len(data.train), data.num_evaluation)
    if data.channels:
        logger.info("Sources with metrics of their own: %s", ", ".join(data.channels))
    for line in report_table(data.report).splitlines():
        logger.info(line)
    for row in data.samples:
        if data_args.dry_run:
            print(show_row(row, tokenizer), end="\n\n")
        elif data_args.debug_data_processing:
            logger.debug("sample row %r", show_row(row, tokenizer, color=False))
    if data_args.debug_data_processing:
        with open(out / "rejected.jsonl", encoding="utf-8") as file:
            for line in file:
                logger.debug("dropped %s", line.rstrip("\n"))


def describe_run(groups: dict[str, Any], args: DFTTrainingArguments, data: PreparedData) -> dict[str, Any]:
    """What the run is, of its arguments by group; kept in run.json."""
    num_rows = {"training": len(data.train), "evaluation": data.num_evaluation}
    about = about_run({name: vars(group) for name, group in groups.items()}, args, data.report, num_rows)
    if args.process_index == 0:
        write_run(about, Path(args.output_dir))
    return about


def load_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration, checked before any data is prepared for it.

    Raises:
        UserError: it can't be loaded, or its vocabulary is smaller than the tokenizer's.
    """
    name = model_args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(name, **model_args.source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name_or_path {name}: its configuration can't be loaded: {error}") from error
    text_config = config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise UserError(
            f"--model_name_or_path {name}: its tokenizer has {len(tokenizer)} tokens, the model "
            f"{text_config.vocab_size}; resize the embedding and save the model before training"
        )
    return config


def attends_in_16_bits(model_args: ModelArguments, args: DFTTrainingArguments, config: PretrainedConfig) -> bool:
    """Whether the model computes in 16 bits."""
    dtype = str(config.dtype) if model_args.torch_dtype == "auto" else model_args.torch_dtype
    return args.bf16 or args.fp16 or dtype.endswith("float16")


def load_model(
    model_args: ModelArguments, args: DFTTrainingArguments, config: PretrainedConfig, attention: str
) -> PreTrainedModel:
    """The model, sharded at once under ZeRO-3.

    Raises:
        UserError: it can't be loaded.
    """
    name = model_args.model_name_or_path
    if model_args.trust_remote_code:
        logger.warning("Running Python code from %s, revision %s", name, model_args.model_revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=model_args.torch_dtype, attn_implementation=attention, **model_args.source
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"--model_name_or_path {name}: the model can't be loaded: {error}") from error
    size = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ZeRO-3 leaves numel() at 0
    logger.info("Model: %s, %.1f M parameters, %s, %s", type(model).__name__, size / 1e6, model.dtype, attention)
    if model.dtype != torch.float32 and args.deepspeed_plugin is None:
        logger.warning(
            "The weights are %s and updated as such, which loses small updates. Use --torch_dtype float32 with --bf16 "
            "True, or DeepSpeed, which keeps float32 copies.",
            model.dtype,
        )
    return model


def save(trainer: DFTTrainer, metrics: dict[str, float]) -> None:
    """Writes the final model, its tokenizer, the metrics and the trainer's state to the output directory."""
    args = trainer.args
    show_metrics(trainer, "train", metrics)
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        state = trainer.state
        step = state.best_global_step if holds_best(args, state) else state.global_step
        done = [r for r in state.log_history if "eval_loss" in r and r["step"] == step]
        metrics = {key: value for key, value in done[-1].items() if key != "step"} if done else trainer.evaluate()
        show_metrics(trainer, "eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    trainer.save_state()
    if args.process_index == 0:
        # the final model holds no pickle; keys and tokens are left out of the JSON
        (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)
        (Path(args.output_dir) / "training_args.json").write_text(args.to_json_string() + "\n", encoding="utf-8")


def show_metrics(trainer: DFTTrainer, split: str, metrics: dict[str, float]) -> None:
    """Prints metrics but for those of each source, which may be very many; the files have them."""
    trainer.log_metrics(split, {key: value for key, value in metrics.items() if "channel/" not in key})


def command() -> None:
    """The command train-dft."""
    with program():
        main()


if __name__ == "__main__":
    command()
