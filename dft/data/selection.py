"""Which rows are trained on, and which are held out: sampling, duplicates, leakage, the split, the mix.

Rows are known by two digests of 64 bits (two different rows of a million share one with a chance of
3e-8). Every choice is by the seed and the content, so the same rows are chosen each time.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dft.errors import UserError
from dft.reading.files import DataFile
from dft.reading.formats import Conversation

MARKS_OF_TRAINING = ("weight", "train")  # keys of a message that don't make its prompt another one


@dataclass
class Catalog:
    """The valid rows of all files, in order: [R] rows."""

    files: list[DataFile]
    file: np.ndarray  # int32 [R], index into `files`
    ordinal: np.ndarray  # int64 [R], place among all rows of the file, from 0
    content: np.ndarray  # uint64 [R], digest of the whole conversation
    prompt: np.ndarray  # uint64 [R], digest of what stands before the last assistant turn
    rows_read: list[int]  # of each file, valid or not
    has_weights: bool  # some assistant turn has a weight other than 0 and 1


@dataclass
class Selection:
    """What becomes of the rows of a catalog: bool [R] each."""

    train: np.ndarray
    evaluation: np.ndarray
    duplicate: np.ndarray  # same as an earlier row
    leaked: np.ndarray  # a training row with the prompt of an evaluation row
    dropped: dict[str, np.ndarray] = field(default_factory=dict)  # reason -> rows left out for it


def digests(row: Conversation) -> tuple[int, int]:
    """Digests of a conversation and of its prompt, what stands before its last assistant turn.

    White space around a message doesn't count. What is trained on (weights) and the template's arguments
    belong to the conversation and not to the prompt. A prompt without a user's message is no prompt: it
    has the digest of the whole.
    """
    messages = [{**m, "content": m["content"].strip()} for m in row.messages]
    content = _digest([messages, row.tools, row.template_kwargs])
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if not any(m["role"] == "user" for m in messages[:last]):
        return content, content
    prompt = [{key: value for key, value in m.items() if key not in MARKS_OF_TRAINING} for m in messages[:last]]
    return content, _digest([prompt, row.tools])


def _digest(value: object) -> int:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def select(
    rows: Catalog,
    train_files: Iterable[int],
    eval_files: Iterable[int],
    *,
    dedup: bool,
    drop_leaked: bool,
    validation_split_percentage: float,
    max_eval_samples: int | None,
    seed: int,
) -> Selection:
    """Chooses training and evaluation rows.

    Args:
        train_files, eval_files: indices of files; without eval_files, training rows are held out.
        dedup: keep only the first of equal rows.
        drop_leaked: don't train on rows with the prompt of an evaluation row.
        validation_split_percentage: share of the training rows to hold out, in percent.
        max_eval_samples: most evaluation rows, None or 0 for no limit.

    Raises:
        UserError: nothing would be left to train on.
    """
    rng = np.random.default_rng(seed)
    wanted = np.ones(len(rows.file), dtype=bool)
    for index, file in enumerate(rows.files):
        if file.max_rows is not None:
            own = np.flatnonzero(rows.file == index)
            wanted[own] = False
            wanted[sample(own, file.max_rows, rng)] = True
    eval_files = list(eval_files)
    train = wanted & np.isin(rows.file, list(train_files))
    evaluation = wanted & np.isin(rows.file, eval_files)
    duplicate = _repeats(rows.content, train) | _repeats(rows.content, evaluation & ~train)
    dropped = {}
    if dedup:
        dropped["duplicate"] = duplicate
        train, evaluation = train & ~duplicate, evaluation & ~duplicate
    if eval_files:
        chosen = np.flatnonzero(evaluation)
        evaluation = np.zeros_like(evaluation)
        evaluation[sample(chosen, max_eval_samples or len(chosen), rng)] = True
    elif validation_split_percentage > 0:
        evaluation = hold_out(rows.prompt, train, validation_split_percentage, max_eval_samples, seed)
        train &= ~evaluation
    leaked = train & np.isin(rows.prompt, rows.prompt[evaluation])
    if drop_leaked:
        dropped["leaked"] = leaked & ~evaluation
        train = train & ~leaked
        if not train.any():
            raise UserError("--drop_leaked leaves no training row: all have the prompt of an evaluation row")
    return Selection(train, evaluation, duplicate, leaked, dropped)


def sample(indices: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """At most `size` of the indices, in order."""
    return np.sort(rng.permutation(indices)[:size])


def _repeats(digest: np.ndarray, among: np.ndarray) -> np.ndarray:
    """bool [R]: rows of `among` that have the digest of an earlier one of them."""
    indices = np.flatnonzero(among)
    _, first = np.unique(digest[indices], return_index=True)
    repeats = among.copy()
    repeats[indices[first]] = False
    return repeats


def hold_out(prompt: np.ndarray, among: np.ndarray, percentage: float, max_rows: int | None, seed: int) -> np.ndarray:
    """The rows held out, bool [R]. Rows with one prompt stay on one side.

    Whether a prompt is held out depends on the seed and on the prompts alone, not on the order of the files.

    Args:
        prompt: uint64 [R]. among: bool [R], the rows to choose from.
        percentage: share to hold out; above 0, at least one row, or all rows of one prompt.
        max_rows: most rows held out, None or 0 for no limit.

    Raises:
        UserError: nothing would be left to train on.
    """
    prompts, counts = np.unique(prompt[among], return_counts=True)
    num_rows = int(counts.sum())
    size = min(max(1, round(num_rows * percentage / 100)), max_rows or num_rows)
    order = np.random.default_rng(seed).permutation(len(prompts))
    room = size
    chosen = []
    for index in order:
        if counts[index] <= room:
            chosen.append(index)
            room -= counts[index]
        if room == 0:
            break
    smallest = np.argmin(counts[order]) if len(order) else 0
    if not chosen and len(prompts) > 1 and counts[order[smallest]] <= (max_rows or num_rows):
        chosen = [order[smallest]]
    if not chosen or len(chosen) == len(prompts):
        raise UserError(
            f"{num_rows} rows with {len(prompts)} different prompts can't be split into training and evaluation: add "
            "data, or --validation_split_percentage 0"
        )
    return among & np.isin(prompt, prompts[chosen])


def mix(file: np.ndarray, files: list[DataFile], seed: int) -> np.ndarray | None:
    """The order of an epoch, int64: row i as often as the weight of its file says; None where all weigh 1.

    A weight of 2.5 means every row twice, and a random half of the rows once more.

    Args:
        file: int32 [N], the file of each training row.
    """
    if all(f.weight == 1 for f in files):
        return None
    rng = np.random.default_rng(seed)
    copies = np.zeros(len(file), dtype=np.int64)
    for index, some in enumerate(files):
        own = np.flatnonzero(file == index)
        copies[own] = int(some.weight)
        copies[sample(own, round(len(own) * (some.weight % 1)), rng)] += 1
    if not copies.any():
        raise UserError(f"--data_weights {[f.weight for f in files]} leave no row to train on")
    return np.repeat(np.arange(len(file)), copies)
