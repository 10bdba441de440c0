"""Keep rows that are good, that cover the instructions, and that the model needs: MoDS, arXiv 2311.15653.

    python scripts/select_data.py mods --reward_model rm --model base --data_files data/ --output chosen \\
        --alpha 0 --beta 0 --seed_rows 1000 --augmented_rows 1000 --train_flags="--num_train_epochs 3"

1. Quality: a reward model scores all rows; those of at least --alpha stay.
2. Coverage: k-center greedy over their instructions chooses --seed_rows, the seed set.
3. Necessity: a model that is trained on the seed set answers the instructions of all rows that stayed. The model needs
   the rows for which the reward model scores its answer below --beta.
4. Coverage again: of these, k-center greedy chooses --augmented_rows, with the seed set as centers that are there.
The seed set and the augmented set are kept.

--train_flags trains the model by scripts/train.sh, and --initial_model names one that you have trained on the seed
set. With neither, the command ends after the second step, keeps the seed set, and says how to go on. What was computed
is not computed again.
"""

import argparse
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dft.errors import UserError
from dft.files import path_argument
from dft.printable import printable
from dft.program import rank_and_world_size
from dft.reading.rows import Conversation
from dft.selection.method import Command, Decide, Decision
from dft.selection.model_flags import ModelFlags, add_model_arguments, check_max_length
from dft.selection.mods_report import Steps, decision
from dft.selection.mods_training import SeedTraining


@dataclass(frozen=True)
class ModsConfig:
    """What is kept, and by which models.

    Args:
        reward_model: scores rows and answers.
        embedding_model: of instructions.
        training: of the initial model on the seed set.
        alpha: the least score of a row of high quality.
        beta: the model needs rows for which its own answer scores below it.
        initial_model: one that was trained on the seed set; None for that of `training`.
        label: of a classifier, see RewardModel.
        max_length: longer instructions are cut before they are embedded, in tokens.
        max_new_tokens: of an answer.
        generated_at_once: tokens of prompts and answers of a batch.
    """

    reward_model: ModelFlags
    embedding_model: ModelFlags
    training: SeedTraining
    alpha: float
    beta: float
    seed_rows: int
    augmented_rows: int
    initial_model: ModelFlags | None = None
    label: str | None = None
    max_length: int = 8192
    max_new_tokens: int = 512
    generated_at_once: int = 32768

    def __post_init__(self):
        check_max_length(self.max_length)
        for name in ("alpha", "beta"):
            if not np.isfinite(getattr(self, name)):
                raise UserError(f"--{name} {getattr(self, name):g} must be a finite number")
        for name in ("seed_rows", "augmented_rows", "max_new_tokens", "generated_at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.initial_model is not None and self.training.flags is not None:
            raise UserError("give one of --initial_model and --train_flags: the first is trained already")
        if self.training.flags is not None and rank_and_world_size()[1] > 1:
            raise UserError(
                "--train_flags can't be used under a launcher of several processes: leave the flag out, train as the "
                "command then says, and give the result as --initial_model"
            )


def mods(config: ModsConfig) -> Decide:
    """The method of these settings."""

    def decide(rows: Iterator[Conversation]) -> Decision:
        conversations = list(rows)
        config.training.check_outside(conversations)
        steps = Steps(config.alpha, config.beta, len(conversations))
        _score_rows(steps, conversations, config)
        embeddings = _choose_seeds(steps, conversations, config)
        if len(steps.seeds):
            seed_rows = [conversations[i] for i in sorted(steps.seeds.tolist())]
            steps.notes += config.training.write_seeds(seed_rows)
            initial = config.initial_model or config.training.trained_model()
            if initial is None:
                steps.notes.append(config.training.how_to_go_on())
            else:
                _answer(steps, conversations, initial, config)
                _choose_augmented(steps, embeddings, config)
        return decision(conversations, steps)

    return decide


def _score_rows(steps: Steps, rows: list[Conversation], config: ModsConfig) -> None:
    """The first step."""
    from dft.selection.reward_model import RewardModel

    flags = config.reward_model
    model = RewardModel(flags, config.label)
    steps.quality, refusals = model.scores(rows, None, flags.tokens_at_once, flags.cache_dir)
    steps.not_scored = {index: (error.reason, error.detail) for index, error in refusals.items()}


def _choose_seeds(steps: Steps, rows: list[Conversation], config: ModsConfig) -> np.ndarray:
    """The second step; returns the embeddings of the rows that have an instruction, float32 [places, H]."""
    from dft.selection.embeddings import embed_instructions
    from dft.selection.k_center import k_center_greedy

    good = np.flatnonzero(steps.is_good)
    places, embeddings = embed_instructions([rows[i] for i in good], config.embedding_model, config.max_length)
    steps.embedded = good[places]
    if len(places) == 0:
        return embeddings
    steps.seeds = steps.embedded[k_center_greedy(embeddings, config.seed_rows).picks]
    if len(steps.seeds) < config.seed_rows:
        steps.notes.append(
            f"The seed set has {len(steps.seeds):,} rows, not {config.seed_rows:,}: no other row of high quality has "
            "an instruction of its own."
        )
    return embeddings


def _answer(steps: Steps, rows: list[Conversation], initial: ModelFlags, config: ModsConfig) -> None:
    """The third step."""
    from dft.selection.answers import answer_rows, with_answer
    from dft.selection.reward_model import RewardModel

    good = np.flatnonzero(steps.is_good)
    answers = answer_rows([rows[i] for i in good], initial, config.max_new_tokens, config.generated_at_once)
    steps.answers = {int(good[place]): text for place, text in answers.texts.items()}
    steps.not_answered = {int(good[place]): (e.reason, e.detail) for place, e in answers.refusals.items()}
    steps.cut_answers = answers.cut
    flags = config.reward_model
    answered = [with_answer(rows[index], text) for index, text in steps.answers.items()]
    model = RewardModel(flags, config.label)
    scores, refusals = model.scores(answered, None, flags.tokens_at_once, flags.cache_dir)
    indices = list(steps.answers)
    steps.answer_quality[indices] = scores
    for place, error in refusals.items():
        steps.not_answered[indices[place]] = ("answer_not_scored", f"the model's answer: {error.detail}")


def _choose_augmented(steps: Steps, embeddings: np.ndarray, config: ModsConfig) -> None:
    """The fourth step."""
    from dft.selection.k_center import k_center_greedy

    can_be_chosen = steps.is_needed[steps.embedded]
    if not steps.is_needed.any():
        scored = int(np.isfinite(steps.answer_quality).sum())
        which = f"None of the {scored:,} answers that have a score is below {config.beta:g}"
        steps.notes.append(f"{which if scored else 'No answer has a score'}: the result is the seed set.")
    elif can_be_chosen.any():
        # rows of the seed set may be among them; their distance is 0, so that they aren't chosen again
        seeds = embeddings[np.isin(steps.embedded, steps.seeds)]
        cover = k_center_greedy(embeddings[can_be_chosen], config.augmented_rows, seeds=seeds)
        steps.augmented = steps.embedded[can_be_chosen][cover.picks]
    if steps.is_needed.any() and len(steps.augmented) < config.augmented_rows:
        steps.notes.append(
            f"The augmented set has {len(steps.augmented):,} rows, not {config.augmented_rows:,}: no other row that "
            "the model needs has an instruction of its own."
        )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward_model", type=path_argument, required=True, help="directory of a sequence classifier")
    parser.add_argument("--label", help="of a classifier with several labels: its name or number")
    parser.add_argument("--model", type=path_argument, required=True, help="directory of the base model")
    parser.add_argument("--embedding_model", type=path_argument, help="for the instructions; by default --model")
    parser.add_argument("--alpha", type=float, required=True, help="the least score of a row of high quality")
    parser.add_argument("--beta", type=float, required=True, help="rows are needed if the model's answer scores below")
    parser.add_argument("--seed_rows", type=int, required=True, help="at most so many rows are trained on first")
    parser.add_argument("--augmented_rows", type=int, required=True, help="at most so many needed rows are added")
    parser.add_argument("--train_flags", help="train on the seed rows, with these flags of scripts/train.sh")
    parser.add_argument("--initial_model", type=path_argument, help="the model, if it is trained on them already")
    parser.add_argument("--work_dir", type=path_argument, help="for seed rows and model; by default OUTPUT.work")
    parser.add_argument("--max_length", type=int, default=8192, help="longer instructions are cut, in tokens")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of an answer; by default 512")
    parser.add_argument("--generated_at_once", type=int, default=32768, help="tokens of prompts and answers at once")
    add_model_arguments(parser)


def _method(args: argparse.Namespace) -> Decide:
    base = ModelFlags.of(args, args.model, "--model")
    train_flags = None if args.train_flags is None else _words(args.train_flags)
    work = args.work_dir or Path(f"{args.output}.work")
    if Path(os.path.realpath(work)).is_relative_to(os.path.realpath(args.output)):
        raise UserError(f"--work_dir {printable(work)} lies in --output, which is replaced as a whole: give another")
    of_other = {
        name: None if path is None else ModelFlags.of(args, path, f"--{name}")
        for name, path in (("embedding_model", args.embedding_model), ("initial_model", args.initial_model))
    }
    config = ModsConfig(
        reward_model=ModelFlags.of(args, args.reward_model, "--reward_model"),
        embedding_model=of_other["embedding_model"] or base,
        training=SeedTraining(base, work, train_flags),
        alpha=args.alpha,
        beta=args.beta,
        seed_rows=args.seed_rows,
        augmented_rows=args.augmented_rows,
        initial_model=of_other["initial_model"],
        label=args.label,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        generated_at_once=args.generated_at_once,
    )
    return mods(config)


def _words(flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"--train_flags {printable(flags)}: {error}") from error


COMMAND = Command("mods", "keep rows that are good, diverse, and needed", __doc__, _add_arguments, _method)
