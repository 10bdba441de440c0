"""Evaluate a model on chat files: cross-entropy, perplexity, p_correct and accuracy, over all and of each source.

    python scripts/evaluate.py outputs/dft --data_files eval.jsonl
    torchrun --nproc-per-node 8 scripts/evaluate.py outputs/dft --data_files data/ --output scores.json
    python scripts/evaluate.py outputs/dft --data_files eval.jsonl --generate --answers answers.jsonl

The numbers are those of the training's own evaluation on the same rows: what isn't given here is as it was there,
by the run.json that lies in the model's directory or beside the checkpoint.

--generate also asks the model: it writes the last answer of each row anew, and docs/evaluation.md says how that is
scored.
"""

from dft.program import program, quiet_imports

if __name__ == "__main__":  # before the imports that this is about
    quiet_imports()

import argparse
import json
import math
import tempfile
from functools import partial
from typing import Any, TypeVar, get_args

from data_utils import prepare_on_each_node
from dft.answers.asking import json_line, record_of
from dft.answers.questions import Questions, questions_of_data, source_names
from dft.answers.report import answers_table, refusal_lines, sample_lines
from dft.answers.trainer import AnswerPlan
from dft.batching.collators import PaddingCollator
from dft.chat.format import ChatFormat
from dft.config.answers import check_sources, parse_scorers
from dft.config.data import FORMATS, Channels, DataConfig, DataValidation
from dft.config.loss import LossConfig
from dft.config.metrics import MetricsConfig
from dft.config.training import DFTTrainingArguments
from dft.data.prepared import PreparedData
from dft.data.tables import aligned
from dft.distributed import has_accelerator, once_per_node
from dft.errors import UserError
from dft.files import check_writable, path_argument
from dft.generation import TOKENS_AT_ONCE, longest_prompt
from dft.model.fit import check_fit
from dft.model.trained import DTYPES, TrainedModel, load_trained
from dft.tracking.run_info import read_run
from dft_trainer import DFTTrainer
from dist_logger import quiet_libraries, setup_logging

T = TypeVar("T")
COLUMNS = {"CE": "ce_loss", "perplexity": "perplexity", "p_correct": "avg_p_correct", "accuracy": "acc"}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    for name in ("output", "answers"):
        if vars(args)[name] is not None:
            check_writable(vars(args)[name], f"--{name}")
    setup_logging()
    quiet_libraries(progress_bars=False)
    run = read_run(args.model)
    with tempfile.TemporaryDirectory() as directory:
        training = training_arguments(args, run.get("training", {}), directory)  # first: it joins the other ranks
        trained = load_trained(args.model, "cpu", args.dtype, args.trust_remote_code)
        config = data_config(args, run.get("data", {}))
        chat_format = ChatFormat.of(trained.tokenizer, config)
        data = prepare_on_each_node(config, chat_format, seed=training.seed)
        check_fit(data, trained.model.config, trained.tokenizer, is_padded=True, grows=False)
        room = longest_prompt(trained.model.config, args.max_new_tokens)
        questions = find_questions(args, run, data, config, chat_format, room) if args.generate else None
        trainer = make_trainer(args, training, trained, data, questions, run)
        metrics = evaluate(trainer, has_loss="dft" in run)
    if training.process_index != 0:
        return
    print(table(metrics, data))
    if questions is not None:
        print(
            "",
            *answers_table(trainer.answers),
            *refusal_lines(questions),
            "",
            *sample_lines(trainer.answers),
            sep="\n",
        )
    if args.answers:
        text = "".join(json_line(record_of(answer, trained.tokenizer)) for answer in trainer.answers)
        args.answers.write_text(text, encoding="utf-8", errors="backslashreplace")
    if args.output:
        args.output.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path_argument, help="directory of a trained model, checkpoint or adapter")
    parser.add_argument("--data_files", nargs="+", required=True, help="files, directories, globs; all rows are used")
    parser.add_argument("--data_format", choices=("auto", *FORMATS), help="as in the training, else auto")
    parser.add_argument(
        "--data_validation",
        choices=get_args(DataValidation),
        help="what malformed rows do; as in the training, else standard",
    )
    parser.add_argument("--max_length", type=int, help="in tokens; as in the training, else 8192")
    parser.add_argument(
        "--channels", choices=get_args(Channels), help="sources told apart; as in the training, else auto"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows at once, on each device; by default 8")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="by default what the model is saved in")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="by default GPUs, if there are any")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--output", type=path_argument, help="JSON file to write the numbers to")
    add_answer_arguments(parser)
    args = parser.parse_args(argv)
    parse_scorers(args.answer_scorers)
    if args.batch_size < 1 or (args.max_length is not None and args.max_length < 1):
        raise UserError("--batch_size and --max_length must be at least 1")
    for name in ("max_new_tokens", "generations", "generated_at_once"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise UserError(f"--{name} is {vars(args)[name]}; it must be at least 1")
    for name in ("generations", "answer_scorers", "answers"):
        if vars(args)[name] is not None and not args.generate:
            raise UserError(f"--{name} is about the model's answers: add --generate")
    return args


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--generate", action="store_true", help="ask the model for the last answer of each row")
    parser.add_argument("--generations", type=int, help="so many rows, as many of each source; by default all")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of an answer; by default 256")
    parser.add_argument("--generated_at_once", type=int, default=TOKENS_AT_ONCE, help="tokens of prompts and answers")
    parser.add_argument(
        "--answer_scorers",
        nargs="+",
        help="how answers are compared, as SOURCE=SCORER: see docs/evaluation.md; as in the training, else '*=auto'",
    )
    parser.add_argument("--answers", type=path_argument, help="JSONL file to write each answer to, with its score")


def training_arguments(args: argparse.Namespace, precision: dict[str, bool], directory: str) -> DFTTrainingArguments:
    """What the trainer is told.

    Args:
        precision: of the training; not used where another dtype is asked for.
    """
    use_cpu = args.device == "cpu" or not has_accelerator()
    precision = precision if args.dtype == "auto" else {}
    return DFTTrainingArguments(
        output_dir=directory,
        per_device_eval_batch_size=args.batch_size,
        use_cpu=use_cpu,
        bf16=precision.get("bf16", False),
        fp16=precision.get("fp16", False) and not use_cpu,
        report_to=["none"],
    )


def data_config(args: argparse.Namespace, settings: dict[str, Any]) -> DataConfig:
    """The flags of the data that a run was started with, for all rows of other files.

    Raises:
        UserError: another version has others.
    """
    other = {"data_files": args.data_files, "eval_data_files": None, "data_cache_dir": None}
    other |= dict.fromkeys(("data_weights", "mix", "stages"))  # of the training alone
    every_row = {"dedup": False, "drop_leaked": False, "validation_split_percentage": 0.0, "overwrite_cache": False}
    flags = ("data_format", "data_validation", "max_length", "channels")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    return flags_of_run(DataConfig, settings | other | every_row | given)


def flags_of_run(cls: type[T], settings: dict[str, Any]) -> T:
    """A group of flags, as run.json has it.

    Raises:
        UserError: another version has others.
    """
    try:
        return cls(**settings)
    except TypeError as error:
        raise UserError(f"the model's run.json is of another version, mend it or move it away: {error}") from error


class Evaluation(DFTTrainer):
    """A trainer whose records nobody reads."""

    def log(self, *_: Any) -> None:
        pass


def find_questions(
    args: argparse.Namespace,
    run: dict[str, Any],
    data: PreparedData,
    config: DataConfig,
    chat_format: ChatFormat,
    room: int,
) -> Questions:
    """What the model is asked, which one process of each node reads from the files.

    Args:
        run: see read_run.
        room: tokens of the longest prompt that is asked.
    """
    if args.answer_scorers is None:  # those of the training may be about other sources, too
        scorers = parse_scorers(run.get("answers", {}).get("answer_scorers"))
    else:
        scorers = parse_scorers(args.answer_scorers)
        check_sources(scorers, source_names(data, of_training=True))
    find = partial(questions_of_data, data, config, chat_format, scorers, args.generations, room, of_training=True)
    return once_per_node(find)


def make_trainer(
    args: argparse.Namespace,
    training: DFTTrainingArguments,
    trained: TrainedModel,
    data: PreparedData,
    questions: Questions | None,
    run: dict[str, Any],
) -> Evaluation:
    """The trainer that evaluates.

    Args:
        run: see read_run.
    """
    plan = None
    if questions is not None:
        plan = AnswerPlan(questions.questions, args.max_new_tokens, args.generated_at_once)
    return Evaluation(
        trained.model,
        training,
        loss=flags_of_run(LossConfig, run["dft"]) if "dft" in run else None,
        metrics=MetricsConfig(log_entropy=run.get("logging", {}).get("log_entropy", False)),
        channels=data.channels,
        processing_class=trained.tokenizer,
        data_collator=PaddingCollator(trained.tokenizer),
        eval_dataset=data.train,
        answers=plan,
    )


def evaluate(trainer: Evaluation, *, has_loss: bool) -> dict[str, float]:
    """The metrics.

    Args:
        has_loss: whether the settings of the loss are known; what depends on them is left out otherwise.
    """
    metrics = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    names = ("ce_loss", "perplexity", "avg_p_correct", "acc", "p_below_0.01", "p_above_0.99", "entropy")
    kept = (*names, "loss", "mean_weight") if has_loss else names
    return {key: value for key, value in metrics.items() if key in kept or key.startswith(("channel/", "answers/"))}


def table(metrics: dict[str, float], data: PreparedData) -> str:
    """The metrics of all rows and of each source, and what they were made from."""
    lines = [("", *COLUMNS), ("all", *(f"{metrics[key]:.4f}" for key in COLUMNS.values()))]
    for name in data.channels:
        ce, p_correct, acc = (metrics.get(f"channel/{name}/{key}") for key in ("ce_loss", "p_correct", "acc"))
        if ce is not None:
            perplexity = math.exp(min(ce, 700.0))
            lines.append((name, *(f"{value:.4f}" for value in (ce, perplexity, p_correct, acc))))
    text = aligned(lines, num_left=1)
    total = data.report["total"]
    dropped = total["rows_read"] - total["kept"]
    text.append(f"{total['kept']:,} rows, {total['supervised_tokens']:,} supervised tokens; {dropped:,} rows dropped")
    return "\n".join(text)


if __name__ == "__main__":
    with program():
        main()
