"""Settings of the data: which files, which rows of them, and how they become tokens."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dft.config.options import option, required
from dft.errors import UserError
from dft.printable import printable

DataFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Truncation = Literal["right", "left", "drop", "error"]
DataValidation = Literal["standard", "strict", "lenient"]
Channels = Literal["auto", "file", "field", "none"]
MixBy = Literal["tokens", "rows"]
TrainOn = Literal["all", "last"]
EmptyTurns = Literal["keep", "skip_turn", "drop_row"]

FORMATS: tuple[str, ...] = get_args(DataFormat)
ROLES: tuple[str, ...] = get_args(Role)
RESERVED_ARGUMENTS = (  # arguments of a chat template that the trainer sets itself
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversations",
    "messages",
    "return_assistant_tokens_mask",
    "tools",
)
RATIOS = re.compile(r"\d{1,12}(\.\d{0,12})?(:\d{1,12}(\.\d{0,12})?)*")  # of --mix
MAX_CHANNELS = 50  # --channels auto makes no more of them: each has a chart, and somebody has to look at it


def parse_role_map(words: list[str] | None) -> dict[str, str]:
    """{name: role} of NAME=ROLE.

    Raises:
        UserError: a word is of another form, or names no role.
    """
    pairs = [word.split("=") for word in words or []]
    if any(len(pair) != 2 or not pair[0] or pair[1] not in ROLES for pair in pairs):
        raise UserError(f"--role_map is {words}; write NAME=ROLE, with a ROLE of {', '.join(ROLES)}")
    return dict(pairs)


@dataclass(frozen=True)
class DataConfig:
    """How chat files become training and evaluation rows.

    Raises:
        UserError: a value outside its range.
    """

    _argument_group_name = "data"

    data_files: list[str] = required(
        "Training data: files (.json, .jsonl, also as .gz and .zst; .parquet), directories, globs. "
        "PATH#N takes a random sample of N rows of each file.",
        ("--train_data_path",),
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
    mix: str | None = option(
        "Ratios of the entries of --data_files in an epoch, as 6:2:1, in place of --data_weights. No row is repeated: "
        "the entry that is the scarcest for its ratio is seen whole, a random part of the others."
    )
    mix_by: MixBy = option("What the ratios of --mix, and shares in --stages, are of: tokens or rows.", "tokens")
    stages: str | None = option(
        "YAML file of stages, which train one after the other on sources of their own; see docs/stages.md."
    )
    dedup: bool = option("Drop rows that repeat an earlier one, in any file.", False)
    drop_leaked: bool = option("Don't train on rows that have the prompt of an evaluation row.", False)
    train_on: TrainOn = option("Assistant turns that are supervised: all, or the last of a row.", "all")
    mask_thinking: bool = option("Don't supervise thinking blocks (<think> … </think> and their like).", False)
    empty_turns: EmptyTurns = option(
        "Assistant turns without text, reasoning and tool calls: supervise their end-of-turn token (keep), don't "
        "supervise them (skip_turn), or drop the row (drop_row).",
        "keep",
    )
    validation_split_percentage: float = option(
        "Share of the training rows held out for evaluation, in percent, from 0 to below 100. Not used with "
        "--eval_data_files.",
        5.0,
    )
    max_eval_samples: int | None = option("Most rows to evaluate on; 0 for no limit.", 1000)
    max_length: int = option("Longest row in tokens, see --truncation.", 8192, ("--model_max_length",))
    truncation: Truncation = option(
        "Longer rows lose their end (right) or their beginning (left), are dropped (drop), or stop the run (error).",
        "right",
    )
    chat_template: str | None = option("File with a Jinja chat template that replaces the tokenizer's own.")
    chat_template_kwargs: str | None = option(
        "Arguments of the chat template for all rows, as a JSON object: '{\"enable_thinking\": false}'. A row's own, "
        "in its column chat_template_kwargs, take precedence."
    )
    data_validation: DataValidation = option(
        "standard: malformed rows stop the run, rows without anything to learn are dropped. strict: both stop. "
        "lenient: both are dropped. Whatever is dropped is counted and written to rejected.jsonl.",
        "standard",
    )
    channels: Channels = option(
        "Sources with metrics of their own. file: the data files. field: what a row's field `channel` says, or its "
        f"file. auto: field where that makes 2 to {MAX_CHANNELS} sources, else file where that does, else none.",
        "auto",
    )
    preprocessing_num_workers: int = option("Processes that tokenize, at most one per core.", 8)
    data_cache_dir: str | None = option(
        "Where tokenized data is kept for the next run with the same files, tokenizer and settings; by default dft in "
        "the cache of Hugging Face's datasets."
    )
    shared_files: bool = option(
        "New directories of output and caches get the umask's modes; by default only this user can enter them.", False
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
        self._check_mix()
        parse_role_map(self.role_map)
        self._check_template_kwargs()
        if self.preprocessing_num_workers < 1:
            raise UserError(f"--preprocessing_num_workers is {self.preprocessing_num_workers}; it must be at least 1")

    def _check_mix(self) -> None:
        if self.mix is None:
            return
        if self.data_weights:
            raise UserError("--mix and --data_weights both say how often rows are seen: drop one")
        if not RATIOS.fullmatch(self.mix):
            raise UserError(f"--mix is {printable(self.mix)}; it must be numbers of at least 0, as 6:2:1")
        ratios = self.mix_ratios
        if len(ratios) != len(self.data_files):
            raise UserError(
                f"--mix {self.mix} has {len(ratios)} ratios for {len(self.data_files)} --data_files: give one for "
                "each. In a YAML file it needs quotes, '6:2:1'"
            )
        if not any(ratios):
            raise UserError(f"--mix is {self.mix}, so that there would be nothing to train on; one must be above 0")

    @property
    def mix_ratios(self) -> list[float]:
        """--mix as numbers; empty without it."""
        return [] if self.mix is None else [float(ratio) for ratio in self.mix.split(":")]

    def _check_template_kwargs(self) -> None:
        try:
            kwargs = self.template_kwargs
        except ValueError as error:
            raise UserError(f"--chat_template_kwargs {self.chat_template_kwargs} is not JSON: {error}") from error
        if not isinstance(kwargs, dict):
            raise UserError(
                f"--chat_template_kwargs {self.chat_template_kwargs} must be a JSON object, such as "
                """'{"enable_thinking": false}'"""
            )
        reserved = [name for name in kwargs if name in RESERVED_ARGUMENTS]
        if reserved:
            raise UserError(f"--chat_template_kwargs can't hold {reserved[0]!r}, which the trainer gives the template")

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """--chat_template_kwargs as an object."""
        return json.loads(self.chat_template_kwargs or "{}")

    @property
    def roles(self) -> dict[str, str]:
        """--role_map as {name: role}."""
        return parse_role_map(self.role_map)

    @property
    def has_evaluation(self) -> bool:
        """Whether there will be rows to evaluate on."""
        return bool(self.eval_data_files) or self.validation_split_percentage > 0
