"""Fine-tune a causal language model on ChatML data with the DFT loss.

    python train_dft.py --model_name_or_path MODEL --data_files data/ --output_dir out              # 1 process
    deepspeed --num_gpus 8 train_dft.py --deepspeed ds_config/zero3.json --config my_run.yaml      # 8 GPUs
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train_dft.py --deepspeed ds_config/zero3.json --config my_run.yaml                         # 8 nodes

scripts/train.sh does this with a log file; --help lists the flags, docs/flags.md explains them.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from dft.config.command_line import Settings, parse_args
from dft.files import make_directory, take_directory
from dft.program import program
from dist_logger import get_logger, quiet_libraries, setup_logging

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dft.answers.trainer import AnswerPlan
    from dft.batching.plan import BatchPlan
    from dft.batching.stages import StagePlan
    from dft.data.prepared import PreparedData
    from dft_trainer import DFTTrainer

logger = get_logger("train_dft")


def main(argv: list[str] | None = None) -> None:
    """One run, from the command line `argv` (by default this program's) to the saved model."""
    settings = parse_args(argv)
    train(settings)


def train(settings: Settings) -> None:
    """One run, from its settings to the saved model."""
    # not at the top: torch and transformers take seconds to import, and --help and mistakes were answered before
    from dft.batching.attention import choose_attention
    from dft.batching.plan import plan_batches
    from dft.checkpoints.compare import compare_facts
    from dft.checkpoints.facts import run_facts
    from dft.checkpoints.resume import find_checkpoint
    from dft.config.training import with_values
    from dft.distributed import once_per_node
    from dft.model.adapters import check_adapters
    from dft.model.fit import check_fit
    from dft.model.loading import computes_in_16_bits, load_config, load_model, load_model_tokenizer
    from dft.model.memory import warn_if_too_large
    from dft.parallel.agreement import agree_on_data, agree_on_settings
    from dft.parallel.heartbeat import Heartbeat
    from dft.parallel.ulysses import check_attention
    from dft.stopping import end_with_launcher
    from dft.tracking.results import present_run, save_evaluation, save_run
    from dft.tracking.run_info import describe_run
    from dft.tracking.tracker_checks import check_trackers
    from dft.tracking.tracker_start import start_trackers

    model_config, adapters, data_config, loss_config, _, _, args = settings
    start_logging(settings)
    end_with_launcher()
    agree_on_settings(settings, args)
    check_adapters(adapters, model_config, bool(args.fsdp))
    # a training in stages is one epoch of them all
    run_args = args if data_config.stages is None else with_values(args, num_train_epochs=1.0)
    checkpoint, steps_done = find_checkpoint(run_args) if args.do_train else (None, 0)
    is_tracked = args.do_train and not data_config.dry_run
    trackers = check_trackers(args, shared=data_config.shared_files) if is_tracked else {}
    tokenizer = load_model_tokenizer(model_config, data_config.chat_template)
    config = load_config(model_config)
    is_16_bit = computes_in_16_bits(model_config, args, config)
    attention = choose_attention(model_config.attn_implementation, config, is_16_bit, model_config.attn_strict)
    check_attention(args.sequence_parallel_size, config, attention)
    plan = plan_batches(args, data_config.max_length, config, attention)
    data, stages = load_data(settings, tokenizer, plan)
    check_fit(data, config, tokenizer, is_padded=plan.batching == "padded", grows=model_config.resize_embeddings)
    answers = load_questions(settings, tokenizer, config, data) if settings.answers.eval_generations else None
    if data_config.dry_run:
        return
    facts = once_per_node(partial(run_facts, args, loss_config, config, data.train, plan, stages))
    made_with = facts | adapters.facts
    agree_on_data(made_with, data, steps_done, attention)
    if checkpoint is not None:
        compare_facts(checkpoint, made_with, go_on=args.resume_anyway)
    about = describe_run(settings, data) if args.do_train else {}
    report_to = start_trackers(args, trackers, about, steps_done) if args.do_train else []
    model = load_model(model_config, adapters, args, config, tokenizer, attention)
    warn_if_too_large(model, settings, int(data.lengths.max(initial=1)))
    trainer = make_trainer(
        settings, model, tokenizer, data, plan, stages, answers=answers, report_to=report_to, made_with=made_with
    )
    if not args.do_train:
        save_evaluation(trainer)
        return
    heartbeat = Heartbeat()
    trainer.add_callback(heartbeat)
    trainer.stop.listen(args.max_runtime_minutes)
    with heartbeat.naming_lost_ranks():
        result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.stop.raise_if_stopped(trainer.state, args.output_dir)
    save_run(trainer, result.metrics)
    if args.process_index == 0:
        present_run(trainer, about, data.report)


def make_trainer(
    settings: Settings,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: "PreparedData",
    plan: "BatchPlan",
    stages: "StagePlan | None",
    *,
    answers: "AnswerPlan | None",
    report_to: list[str],
    made_with: dict[str, Any],
) -> "DFTTrainer":
    """The trainer of a run, with what shows its progress.

    Args:
        answers: what the model is asked at each evaluation.
        report_to: the trackers.
        made_with: see dft.checkpoints.facts.run_facts.
    """
    from dft.config.training import with_values
    from dft.tracking.answers import show_answers
    from dft.tracking.console import print_lines
    from dft.tracking.curves import Curves
    from dft.tracking.tracker_guard import guard_trackers
    from dft.tracking.train_log import TrainLog
    from dft_trainer import DFTTrainer

    args = settings.training
    rows = plan.training_rows(data.train, data.lengths) if stages is None else stages.training_rows(data.train)
    decided = {"batching": plan.batching, "train_sampling_strategy": plan.strategy, "report_to": report_to}
    if stages is not None:
        decided["max_steps"] = args.max_steps if args.max_steps > 0 else stages.num_steps
    trainer = DFTTrainer(
        model,
        with_values(args, **decided),
        loss=settings.loss,
        metrics=settings.metrics,
        source_of_row=data.source_of,
        channels=data.channels,
        row_lengths=data.lengths,
        data_collator=plan.collator(tokenizer),
        train_dataset=rows,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        callbacks=[TrainLog(args.output_dir), Curves(args.output_dir)] if args.do_train else [],
        stages=stages,
        answers=answers,
        made_with=made_with,
    )
    guard_trackers(trainer)
    print_lines(trainer)
    if answers is not None:
        show_answers(trainer)
    return trainer


def start_logging(settings: Settings) -> None:
    """Makes the output directories and starts the log.

    Raises:
        UserError: one of them can't be written to.
    """
    args = settings.training
    shared = settings.data.shared_files
    output_dir = make_directory(args.output_dir, "--output_dir", shared=shared)
    if args.process_index == 0 and not settings.data.dry_run:
        take_directory(output_dir, "--output_dir")
    log_dir = make_directory(args.logging_dir or args.output_dir, "--logging_dir", shared=shared)
    log_file = log_dir / "train_distributed.log"
    setup_logging(log_file, settings.metrics.reduce_logging, debug=settings.data.debug_data_processing)
    quiet_libraries(progress_bars=not args.disable_tqdm)


def load_data(
    settings: Settings, tokenizer: "PreTrainedTokenizerBase", plan: "BatchPlan"
) -> tuple["PreparedData", "StagePlan | None"]:
    """The training and evaluation rows, tokenized by one process of each node and read by all; and their stages."""
    from data_utils import prepare_on_each_node
    from dft.chat.format import ChatFormat
    from dft.data.show import show_data

    config, args = settings.data, settings.training
    chat_format = ChatFormat.of(tokenizer, config)
    logger.info("Assistant turns are found by: %s", chat_format.method)
    is_main = args.process_index == 0
    data = prepare_on_each_node(config, chat_format, seed=args.seed, progress=is_main and not args.disable_tqdm)
    stages = None
    if args.do_train:
        stages = load_stage_plan(settings, data, plan)
        if stages is None:  # whose steps are always complete
            plan.check_rows(data.lengths)
    if is_main:
        plan.add_to_report(data.report, data.lengths, data.training_lengths())
        show_data(data, config, tokenizer, args.output_dir)
    return data, stages


def load_questions(
    settings: Settings, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", data: "PreparedData"
) -> "AnswerPlan":
    """What the model is asked at each evaluation, by --eval_generations."""
    from dft.answers.asking import check_metric
    from dft.answers.questions import questions_of_data, source_names
    from dft.answers.report import refusal_lines
    from dft.answers.trainer import AnswerPlan
    from dft.chat.format import ChatFormat
    from dft.config.answers import check_sources
    from dft.distributed import once_per_node
    from dft.generation import longest_prompt
    from dft.model.fit import check_vocabulary, ids_in

    answers, chat_format = settings.answers, ChatFormat.of(tokenizer, settings.data)
    check_sources(answers.scorers, source_names(data))
    room = longest_prompt(config, answers.eval_max_new_tokens)
    of_data = (data, settings.data, chat_format, answers.scorers, answers.eval_generations, room)
    found = once_per_node(partial(questions_of_data, *of_data))
    check_metric(settings.training.metric_for_best_model, found.questions)
    if not settings.model.resize_embeddings:
        check_vocabulary(config, tokenizer, ids_in([question.prompt for question in found.questions]), is_padded=True)
    how = ", ".join(f"{source} by {scorer}" for source, scorer in found.groups)
    logger.info("Answers: %d evaluation rows are asked at each evaluation, %s", len(found.questions), how)
    for line in refusal_lines(found):
        logger.warning(line)
    return AnswerPlan(found.questions, answers.eval_max_new_tokens)


def load_stage_plan(settings: Settings, data: "PreparedData", plan: "BatchPlan") -> "StagePlan | None":
    """The steps of the stages of --stages, which are added to the data report; None without the flag."""
    from dft.batching.stages import plan_stages
    from dft.config.stages import load_stages
    from dft.data.stages import describe_stages, rows_of_stages
    from dft.staged import check_stages_can_run, warn_of_early_end

    config, args = settings.data, settings.training
    if config.stages is None:
        return None
    written = load_stages(config.stages)
    sources = rows_of_stages(written, data, config.mix_by)
    num_steps = plan.steps_of_run(data.lengths, args.max_steps, args.num_train_epochs)
    stages = plan_stages(written, sources, data.lengths, plan, num_steps)
    max_steps = args.max_steps if args.max_steps > 0 else stages.num_steps
    check_stages_can_run(stages, args, max_steps)
    warn_of_early_end(stages, max_steps)
    drawn = [(stage.num_steps, stage.rows) for stage in stages.stages]
    data.report["stages"] = describe_stages(written, sources, drawn, data.lengths)
    return stages


def command() -> None:
    """The command train-dft."""
    with program():
        main()


if __name__ == "__main__":
    command()
