"""Answers in evaluations: in the log, in answers.jsonl, in tables of the trackers, and in the model card."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dft.answers.asking import Answer, record_of
from dft.answers.report import answers_table, choose_samples, sample_lines, shortened
from dft.answers.trainer import AnsweringTrainer
from dft.files import dispensable
from dft.printable import printable
from dft.tracking.markdown import markdown_table
from dft.tracking.tracker_guard import GuardedTracker

logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.jsonl"
TABLE_KEY = "eval/answers_table"
TABLE_ROWS = 50
TABLE_CHARACTERS = 1000  # of a text
HEADER = ("place", "source", "question", "reference", "answer", "right", "ended")


def show_answers(trainer: AnsweringTrainer) -> None:
    """Has the answers of each evaluation of a trainer logged, written and sent to its trackers."""
    trainer.add_callback(AnswersLog(trainer))
    for name in trainer.args.report_to:
        if name in TABLES:
            trainer.add_callback(GuardedTracker(TABLES[name](trainer)))


class AnswersLog(TrainerCallback):
    """Logs scores and sample answers at each evaluation, and writes all answers to answers.jsonl with their step."""

    def __init__(self, trainer: AnsweringTrainer):
        self._trainer = trainer
        self._path = Path(trainer.args.output_dir) / ANSWERS_FILE
        self._is_begun = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Begins the file anew on rank 0, with what the evaluations up to the step of a resumed run have answered."""
        if state.is_world_process_zero:
            earlier = _lines(self._path) if state.global_step else []
            self._begin(line for line, step in earlier if step <= state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        """Logs and writes the answers on rank 0."""
        if not state.is_world_process_zero:
            return
        if not self._is_begun:
            self._begin([])
        answers = self._trainer.answers
        shown = [*answers_table(answers), *sample_lines(answers)]
        logger.info("Answers at step %d:\n%s", state.global_step, "\n".join(shown))
        records = [{"step": state.global_step} | record_of(a, self._trainer.processing_class) for a in answers]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with dispensable(self._path), open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)

    def _begin(self, lines: Iterable[str]) -> None:
        self._is_begun = True
        text = "".join(lines)
        with dispensable(self._path):
            self._path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _lines(path: Path) -> list[tuple[str, int]]:
    """The lines of an answers.jsonl that are whole, and the step of each."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.split("\n"):
        try:
            found.append((line + "\n", int(json.loads(line)["step"])))
        except (ValueError, TypeError, KeyError):  # cut where a run was killed
            continue
    return found


# ---- tables of trackers -------------------------------------------------------------------------


class AnswersTable(TrainerCallback):
    """Sends a table of answers to a tracker at each evaluation, on rank 0."""

    def __init__(self, trainer: AnsweringTrainer):
        self._trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs):
        """Sends the answers of some questions, the same ones each time."""
        if state.is_world_process_zero:
            answers = choose_samples(self._trainer.answers, TABLE_ROWS)
            self.send([table_row(answer) for answer in answers], state.global_step)

    def send(self, rows: list[tuple[str, ...]], step: int) -> None:
        """Sends rows with the columns of HEADER."""
        raise NotImplementedError


class SwanLabTable(AnswersTable):
    def send(self, rows: list[tuple[str, ...]], step: int) -> None:
        """Logs an ECharts table."""
        import swanlab

        table = swanlab.echarts.Table().add(list(HEADER), [list(row) for row in rows])
        swanlab.log({TABLE_KEY: table}, step=step)


class WandbTable(AnswersTable):
    def send(self, rows: list[tuple[str, ...]], step: int) -> None:
        """Logs a table at the step that transformers' callback has defined."""
        import wandb

        table = wandb.Table(columns=list(HEADER), data=[list(row) for row in rows])
        wandb.log({TABLE_KEY: table, "train/global_step": step})


TABLES: dict[str, type[AnswersTable]] = {"swanlab": SwanLabTable, "wandb": WandbTable}


def table_row(answer: Answer) -> tuple[str, ...]:
    """An answer as texts, in the columns of HEADER."""
    question = answer.question
    texts = (question.asked, question.reference, answer.text)
    shown = (printable(text[:TABLE_CHARACTERS], lines=True) for text in texts)
    return (
        printable(question.place),
        printable(question.source),
        *shown,
        _yes(answer.is_right),
        _yes(answer.has_ended),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# ---- the model card -----------------------------------------------------------------------------


def answers_of_step(output_dir: str, step: int) -> list[dict[str, Any]]:
    """The answers that the evaluation of a step has written to answers.jsonl; empty if there was none."""
    return [json.loads(line) for line, of_step in _lines(Path(output_dir) / ANSWERS_FILE) if of_step == step]


def answers_section(answers: list[dict[str, Any]]) -> str:
    """The section of the model card about answers, between empty lines; "" without any."""
    if not answers:
        return ""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        groups[answer["source"], answer["scorer"]].append(answer)
    scores = [
        (source, scorer, f"{len(some):,}", f"{_share(some, 'is_right'):.4f}", f"{_share(some, 'has_ended'):.4f}")
        for (source, scorer), some in sorted(groups.items())
    ]
    samples = [
        (*(shortened(answer[key]) for key in ("asked", "reference", "answer")), _yes(answer["is_right"]))
        for answer in choose_samples(answers)
    ]
    return f"""
## Answers

Answers of {len(answers):,} evaluation rows, written anew by greedy search and compared with the rows' own.

{markdown_table(("source", "compared by", "rows", "right", "ended"), scores, num_left=2)}

{markdown_table(("question", "reference", "answer", "right"), samples, num_left=4)}
"""


def _share(answers: list[dict[str, Any]], key: str) -> float:
    return sum(answer[key] for answer in answers) / len(answers)
