"""What the steps of MoDS have found, and what that means for each row."""

from dataclasses import dataclass, field, replace

import numpy as np

from dft.printable import printable
from dft.reading.rows import Conversation
from dft.selection.method import NO_INSTRUCTION, Decision, Verdict

ANSWERS = "answers.jsonl"
SEED, AUGMENTED = "seed", "augmented"

Why = tuple[str, str]  # a short name to count by, and a clause for people


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass
class Steps:
    """What is known after the steps that were done.

    Attributes:
        quality: scores of the rows, float64 [R]; NaN where there is none.
        not_scored: {row: why}.
        embedded: rows of high quality that have an instruction, int64.
        seeds, augmented: rows in the order in which they were chosen, int64.
        answers: {row of high quality: text of the model's answer}; None where no model was trained.
        answer_quality: scores of the answers, float64 [R]; NaN where there is none.
        not_answered: {row of high quality: why its answer has no score}.
        cut_answers: how many had not ended after --max_new_tokens.
        notes: whole sentences.
    """

    alpha: float
    beta: float
    num_rows: int
    not_scored: dict[int, Why] = field(default_factory=dict)
    embedded: np.ndarray = field(default_factory=_none)
    seeds: np.ndarray = field(default_factory=_none)
    augmented: np.ndarray = field(default_factory=_none)
    answers: dict[int, str] | None = None
    not_answered: dict[int, Why] = field(default_factory=dict)
    cut_answers: int = 0
    notes: list[str] = field(default_factory=list)
    quality: np.ndarray = field(init=False)
    answer_quality: np.ndarray = field(init=False)

    def __post_init__(self):
        self.quality, self.answer_quality = np.full((2, self.num_rows), np.nan)

    @property
    def is_good(self) -> np.ndarray:
        """Rows of high quality, bool [R]."""
        return self.quality >= self.alpha  # False for NaN

    @property
    def is_needed(self) -> np.ndarray:
        """The necessity set, bool [R]; rows of the seed set may be among them."""
        return self.answer_quality < self.beta

    @property
    def counts(self) -> dict[str, int]:
        """Rows after each step."""
        sets = {"all": self.num_rows, "high quality": int(self.is_good.sum()), SEED: len(self.seeds)}
        if self.answers is not None:
            sets |= {"necessity": int(self.is_needed.sum()), AUGMENTED: len(self.augmented)}
        return sets | {"result": len(self.seeds) + len(self.augmented)}


def decision(rows: list[Conversation], steps: Steps) -> Decision:
    """The decision from the steps that were done: to keep the seed set and the augmented set."""
    chosen = dict.fromkeys(steps.seeds.tolist(), SEED) | dict.fromkeys(steps.augmented.tolist(), AUGMENTED)
    embedded = set(steps.embedded.tolist())
    verdicts = [_verdict(i, steps, chosen.get(i), i in embedded) for i in range(len(rows))]
    scores = {"quality of rows": steps.quality}
    tables = {}
    if steps.answers is not None:
        scores["quality of the model's answers"] = steps.answer_quality
        tables[ANSWERS] = [_entry(rows[i], i, steps, chosen.get(i)) for i in steps.answers]
    counts = steps.counts
    facts = {"rows": counts, "answers that were cut": steps.cut_answers}
    return Decision(verdicts, scores, tables, facts, [_sentence(counts), *steps.notes, *_of_answers(steps)])


def _sentence(counts: dict[str, int]) -> str:
    return "Rows: " + " → ".join(f"{name} {count:,}" for name, count in counts.items()) + "."


def _of_answers(steps: Steps) -> list[str]:
    """What a reader of the third step must know."""
    notes = []
    if steps.cut_answers:
        notes.append(f"{steps.cut_answers:,} of {len(steps.answers):,} answers had not ended at --max_new_tokens.")
    if steps.not_answered:
        notes.append(f"{len(steps.not_answered):,} rows of high quality have no answer with a score.")
    needed_seeds = int(steps.is_needed[steps.seeds].sum())
    if needed_seeds:
        notes.append(f"{needed_seeds:,} rows of the necessity set are in the seed set already.")
    return notes


def _verdict(index: int, steps: Steps, chosen: str | None, has_instruction: bool) -> Verdict:
    quality, of_answer = float(steps.quality[index]), float(steps.answer_quality[index])
    if index in steps.not_scored:
        return Verdict(*steps.not_scored[index])
    if not quality >= steps.alpha:
        return Verdict("low_quality", f"score {quality:.4g}, less than {steps.alpha:g}", quality)
    if chosen is not None:
        return Verdict(score=quality if chosen == SEED else of_answer)
    if not has_instruction:
        return replace(NO_INSTRUCTION, score=quality)
    if steps.answers is None:
        return Verdict("not_in_seed", "a row of the seed set has a similar instruction", quality)
    if index in steps.not_answered:
        return Verdict(*steps.not_answered[index], quality)
    if not of_answer < steps.beta:
        return Verdict("answered_well", f"the model's answer scores {of_answer:.4g}", of_answer)
    detail = f"a kept row has a similar instruction; the model's answer scores {of_answer:.4g}"
    return Verdict("covered", detail, of_answer)


def _entry(row: Conversation, index: int, steps: Steps, chosen: str | None) -> dict[str, object]:
    """A line of answers.jsonl."""
    of_answer = float(steps.answer_quality[index])
    return {
        "path": printable(row.path),
        "line": row.line,
        "quality": round(float(steps.quality[index]), 6),
        "answer_quality": round(of_answer, 6) if np.isfinite(of_answer) else None,
        "set": chosen,
        "answer": steps.answers[index],
    }
