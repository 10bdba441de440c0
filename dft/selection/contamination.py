"""The command contamination: training rows that share a long run of words with an evaluation row are dropped.

The rule is that of GPT-3 (Brown et al., Language Models are Few-Shot Learners, 2020, appendix C): a run of 13 words,
in lower case and without punctuation, that both hold. Where one of the two has fewer than 13 words, runs of 8 are
compared; an evaluation row of fewer than 8 can't be told from common speech, and is left out and counted. In scripts
without spaces a character counts as a word.

The prompt (the user's messages) and the answer (the assistant's) of an evaluation row are compared one by one; a row
may have no answer. The
score of a training row is the share of different n-grams of such a part that it holds, of the part of which it holds
most. An n-gram that more than `max_rows_per_ngram` training rows hold is taken for boilerplate (an instruction, a
licence): it counts in the score, but doesn't flag a row by itself. A prompt that many training rows answer has such
n-grams too, so a row that holds at least `copied_share` of a prompt is dropped however common they are.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dft.config.data import parse_role_map
from dft.errors import UserError
from dft.printable import printable
from dft.reading.rows import Conversation
from dft.selection.inputs import InputFile, find_inputs, read_inputs
from dft.selection.method import KEPT, Command, Decide, Decision, Verdict
from dft.selection.ngram_index import NgramIndex
from dft.selection.shingles import Hashes, in_batches, shingles, text_of, tokenize

PARTS = {"prompt": "user", "answer": "assistant"}  # of an evaluation row: whose messages


@dataclass(frozen=True)
class ContaminationConfig:
    """Settings of contamination."""

    ngram: int = 13  # words
    short_ngram: int = 8  # words; where a row has fewer than `ngram`
    min_overlap: float = 0.0  # share of a prompt or an answer from which a row is dropped; 0: one n-gram
    max_rows_per_ngram: int = 10  # an n-gram of more training rows doesn't flag a row; GPT-3's number
    copied_share: float = 0.8  # a row that holds as much of a prompt is dropped however common that is; 0: off

    def __post_init__(self):
        if not 1 <= self.short_ngram <= self.ngram <= 100:
            raise UserError(
                f"--short_ngram is {self.short_ngram} and --ngram {self.ngram}: give 1 <= short_ngram <= ngram <= 100"
            )
        if not 0 <= self.min_overlap <= 1:
            raise UserError(f"--min_overlap is {self.min_overlap}: give a share from 0 to 1")
        if self.max_rows_per_ngram < 1:
            raise UserError(f"--max_rows_per_ngram is {self.max_rows_per_ngram}: give at least 1")
        if not 0 <= self.copied_share <= 1:
            raise UserError(f"--copied_share is {self.copied_share}: give a share from 0 to 1")


@dataclass(frozen=True)
class Match:
    """A training row and the evaluation row of which it holds most, by their places among all rows."""

    row: int
    evaluation: int
    part: str  # of the evaluation row: prompt or answer
    score: float  # share of that part's n-grams
    shared: int  # n-grams
    is_contaminated: bool  # False: the overlap is too small, or boilerplate


@dataclass
class Evaluation:
    """The n-grams of the parts of evaluation rows, in three indices: which one is used depends on the lengths.

    Part i is that of the row i // 2, the prompt where i is even.
    """

    config: ContaminationConfig
    places: list[tuple[str, int]] = field(default_factory=list)  # path and line of each row
    too_short: int = 0  # rows of which no part is compared

    def __post_init__(self):
        self.long, self.short = NgramIndex(), NgramIndex()  # n-grams of long parts, short n-grams of short parts
        self.pieces = NgramIndex()  # short n-grams of long parts, for training rows that are short

    def add(self, rows: Iterable[Conversation]) -> "Evaluation":
        """Takes in the rows, once."""

        def texts() -> Iterator[str]:
            for row in rows:
                self.places.append((row.path, row.line))
                yield from (text_of(row, role) for role in PARTS.values())

        first, is_compared = 0, [np.zeros(0, dtype=bool)]
        for batch in in_batches(texts()):
            tokens = tokenize(batch)
            counts = np.diff(tokens.offsets)
            is_long, is_short = counts >= self.config.ngram, counts < self.config.ngram
            is_short &= counts >= self.config.short_ngram
            is_compared.append(is_long | is_short)
            short_ngrams = shingles(tokens, self.config.short_ngram)
            self.long.add(shingles(tokens, self.config.ngram), first, is_long)
            self.short.add(short_ngrams, first, is_short)
            self.pieces.add(short_ngrams, first, is_long)
            first += len(batch)
        for index in (self.long, self.short, self.pieces):
            index.build(first)
        self.too_short = int((~np.concatenate(is_compared).reshape(-1, len(PARTS)).any(axis=1)).sum())
        return self


def contaminated_rows(
    rows: Iterable[Conversation], evaluation: Iterable[Conversation], config: ContaminationConfig | None = None
) -> list[Match]:
    """The training rows that share n-grams with evaluation rows and are contaminated by the rule above, in order."""
    config = config or ContaminationConfig()
    matches = find_matches((text_of(row) for row in rows), Evaluation(config).add(evaluation))
    return [match for match in matches if match.is_contaminated]


def find_matches(texts: Iterable[str], evaluation: Evaluation) -> list[Match]:
    """All training rows that share an n-gram with an evaluation row, contaminated or not, in order."""
    config = evaluation.config
    found: list[tuple[int, NgramIndex, np.ndarray]] = []  # row, index, its n-grams [M] that the index holds
    first = 0
    for batch in in_batches(texts):
        tokens = tokenize(batch)
        counts = np.diff(tokens.offsets)
        is_long, is_compared = counts >= config.ngram, counts >= config.short_ngram
        for index, size, wanted in (
            (evaluation.long, config.ngram, is_long),
            (evaluation.short, config.short_ngram, is_compared),
            (evaluation.pieces, config.short_ngram, is_compared & ~is_long),
        ):
            if wanted.any() and not index.is_empty:
                found += [(first + row, index, own) for row, own in _held(index, shingles(tokens, size), wanted)]
        first += len(batch)
    rows_of = {id(index): Counter() for index in (evaluation.long, evaluation.short, evaluation.pieces)}
    for _, index, own in found:
        rows_of[id(index)].update(own.tolist())
    best: dict[int, Match] = {}
    for row, index, own in found:
        is_rare = np.array([rows_of[id(index)][i] <= config.max_rows_per_ngram for i in own.tolist()])
        match = _best_match(row, index, own, is_rare, config)
        if row not in best or _rank(match) > _rank(best[row]):
            best[row] = match
    return [best[row] for row in sorted(best)]


def _held(index: NgramIndex, hashes: Hashes, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The wanted rows of a batch that hold n-grams of an index: row, and the places of these in the index, [M]."""
    places = index.find(hashes.values)
    hits = np.flatnonzero(places >= 0)
    row_of = np.searchsorted(hashes.offsets, hits, side="right") - 1
    for row in np.unique(row_of).tolist():
        if wanted[row]:
            yield row, np.unique(places[hits[row_of == row]])


def _best_match(
    row: int, index: NgramIndex, own: np.ndarray, is_rare: np.ndarray, config: ContaminationConfig
) -> Match:
    """Of all parts of evaluation rows that share n-grams with a row, one that flags it, or that it holds most of."""
    owners, lengths = index.owners_of(own)
    parts, inverse, shared = np.unique(owners, return_inverse=True, return_counts=True)
    counts = np.zeros(len(parts), dtype=bool)  # whether the n-grams of this part may flag a row
    counts[inverse[np.repeat(is_rare, lengths)]] = True
    scores = shared / index.sizes[parts]
    if config.copied_share > 0:
        counts |= (scores >= config.copied_share) & (parts % len(PARTS) == 0)
    flags = counts & (scores >= config.min_overlap)
    best = np.lexsort((-parts, scores, flags))[-1]
    evaluation, part = divmod(int(parts[best]), len(PARTS))
    return Match(row, evaluation, list(PARTS)[part], float(scores[best]), int(shared[best]), bool(flags[best]))


def _rank(match: Match) -> tuple[bool, float, int]:
    return match.is_contaminated, match.score, -match.evaluation


# ---- the command --------------------------------------------------------------------------------


def contamination(
    config: ContaminationConfig, evaluation: Iterable[Conversation], files: Sequence[InputFile] = ()
) -> Decide:
    """The method of contamination.

    Args:
        evaluation: read once, when the method is used.
        files: that it is read from, whose malformed rows are told.
    """

    def decide(rows: Iterator[Conversation]) -> Decision:
        index = Evaluation(config).add(evaluation)
        if index.too_short == len(index.places):
            raise UserError(
                f"no row of --eval_data_files can be compared: {len(index.places)} valid rows, of which "
                f"{index.too_short} have fewer than {config.short_ngram} words{_and_malformed(files)}"
            )
        num_rows = 0

        def texts() -> Iterator[str]:
            nonlocal num_rows
            for row in rows:
                num_rows += 1
                yield text_of(row)

        matches = find_matches(texts(), index)
        decision = _decision(num_rows, matches, index)
        malformed = sum(len(file.dropped) for file in files)
        if malformed:
            decision.notes.append(f"{malformed:,} rows of --eval_data_files are malformed and not compared.")
        return decision

    return decide


def _and_malformed(files: Sequence[InputFile]) -> str:
    """The end of a sentence that tells the malformed rows of files; "" where there are none."""
    dropped = [(file.path, verdict) for file in files for verdict in file.dropped.values()]
    if not dropped:
        return ""
    path, first = dropped[0]
    return f", and {len(dropped)} malformed ones, the first because: {printable(path)}: {first.detail}"


def _decision(num_rows: int, matches: list[Match], evaluation: Evaluation) -> Decision:
    verdicts = [KEPT] * num_rows
    scores = np.full(num_rows, np.nan)
    found: dict[int, list[Match]] = {}
    for match in matches:
        scores[match.row] = match.score
        verdicts[match.row] = Verdict(score=match.score)
        if match.is_contaminated:
            path, line = evaluation.places[match.evaluation]
            place = f"the {match.part} of the evaluation row {printable(path)}:{line}"
            detail = f"{match.shared} n-grams, {match.score:.0%} of those of {place}"
            verdicts[match.row] = Verdict("contaminated", detail, match.score)
            found.setdefault(match.evaluation, []).append(match)
    table = []
    for row, own in sorted(found.items()):
        path, line = evaluation.places[row]
        table.append({"path": path, "line": line, "rows": len(own), "highest": round(max(m.score for m in own), 4)})
    dropped = sum(match.is_contaminated for match in matches)
    facts = {
        "evaluation_rows": len(evaluation.places),
        "evaluation_rows_too_short": evaluation.too_short,
        "evaluation_rows_found": len(found),
        "rows_with_other_overlap": len(matches) - dropped,
    }
    return Decision(
        verdicts,
        {"Share of an evaluation row's prompt or answer, where an n-gram is shared": scores},
        {"evaluation_rows_found.jsonl": table},
        facts,
        _notes(facts),
    )


def _notes(facts: dict[str, Any]) -> list[str]:
    notes = [
        f"{facts['evaluation_rows_found']:,} of {facts['evaluation_rows']:,} evaluation rows are found in training "
        "rows; see evaluation_rows_found.jsonl."
    ]
    if facts["rows_with_other_overlap"]:
        notes.append(
            f"{facts['rows_with_other_overlap']:,} kept rows share only n-grams with an evaluation row that many "
            "training rows hold, or fewer than --min_overlap asks for."
        )
    if facts["evaluation_rows_too_short"]:
        notes.append(f"{facts['evaluation_rows_too_short']:,} evaluation rows are too short to be compared.")
    return notes


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    default = ContaminationConfig
    add = parser.add_argument
    add("--eval_data_files", nargs="+", required=True, help="files, directories, globs of evaluation rows")
    add("--ngram", type=int, default=default.ngram, help=f"words; by default {default.ngram}")
    add(
        "--short_ngram", type=int, default=default.short_ngram,
        help=f"words, where a row has fewer than --ngram; by default {default.short_ngram}",
    )  # fmt: skip
    add("--min_overlap", type=float, default=default.min_overlap, help="share of a prompt or an answer; by default 0")
    add(
        "--max_rows_per_ngram", type=int, default=default.max_rows_per_ngram,
        help=f"training rows; a more common n-gram flags no row; by default {default.max_rows_per_ngram}",
    )  # fmt: skip
    add(
        "--copied_share", type=float, default=default.copied_share,
        help=f"share of a prompt that flags a row in any case, 0 for none; by default {default.copied_share}",
    )  # fmt: skip


def _method(args: argparse.Namespace) -> Decide:
    config = ContaminationConfig(
        args.ngram, args.short_ngram, args.min_overlap, args.max_rows_per_ngram, args.copied_share
    )
    files = find_inputs(args.eval_data_files, "eval_data_files")
    both = {file.real_path for file in files} & {file.real_path for file in find_inputs(args.data_files)}
    if both:
        raise UserError(f"--eval_data_files names {printable(min(both))}, which --data_files names too")
    rows = read_inputs(files, args.data_format, parse_role_map(args.role_map), with_untrainable=True)
    return contamination(config, rows, files)


COMMAND = Command(
    "contamination",
    "drop rows that hold parts of evaluation rows",
    __doc__,
    _add_arguments,
    _method,
    also_read=("eval_data_files",),
)
