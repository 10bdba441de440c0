"""Row selection: sampling, duplicates, leakage, the train–evaluation split and the mixture of files.

Rows are identified by two 64-bit digests (among a million different rows, two share a digest with probability 3e-8).
Every choice depends on the seed and the content alone, so the same rows are chosen each time.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dft.config.data import DataConfig
from dft.errors import UserError
from dft.printable import printable
from dft.reading.discovery import DataFile
from dft.reading.rows import Conversation

IGNORED_IN_PROMPT = ("weight", "train")  # keys of a message that are ignored when prompts are compared


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
    """The outcome for every row of a catalog: masks, bool [R]."""

    train: np.ndarray
    evaluation: np.ndarray
    duplicate: np.ndarray  # same as an earlier row
    leaked: np.ndarray  # a training row with the prompt of an evaluation row
    dropped: dict[str, np.ndarray] = field(default_factory=dict)  # reason -> rows left out for it


def digests(row: Conversation) -> tuple[int, int]:
    """Digests of a conversation and of its prompt, the messages before its last assistant turn.

    White space around a message is ignored. Loss weights and the template's arguments belong to the conversation, not
    to the prompt. Where no user speaks before the last assistant turn, there is no prompt to compare, and the digest
    of the whole conversation stands in for it.
    """
    messages = [{**m, "content": m["content"].strip()} for m in row.messages]
    content = _digest([messages, row.tools, row.template_kwargs])
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if not any(m["role"] == "user" for m in messages[:last]):
        return content, content
    prompt = [{key: value for key, value in m.items() if key not in IGNORED_IN_PROMPT} for m in messages[:last]]
    return content, _digest([prompt, row.tools])


def _digest(value: object) -> int:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def select(
    rows: Catalog,
    train_files: Iterable[int],
    eval_files: Iterable[int],
    config: DataConfig,
    seed: int,
) -> Selection:
    """Chooses training and evaluation rows.

    Args:
        train_files, eval_files: indices of files; without eval_files, training rows are held out.
        config: its dedup, drop_leaked, validation_split_percentage and max_eval_samples are used.
        seed: of samples and of the rows that are held out.

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
    if config.dedup:
        dropped["duplicate"] = duplicate
        train, evaluation = train & ~duplicate, evaluation & ~duplicate
    if eval_files:
        chosen = np.flatnonzero(evaluation)
        evaluation = np.zeros_like(evaluation)
        evaluation[sample(chosen, config.max_eval_samples or len(chosen), rng)] = True
    elif config.validation_split_percentage > 0:
        share, limit = config.validation_split_percentage, config.max_eval_samples
        evaluation = hold_out(rows.prompt, train, share, limit, seed)
        train &= ~evaluation
    leaked = train & np.isin(rows.prompt, rows.prompt[evaluation])
    if config.drop_leaked:
        dropped["leaked"] = leaked & ~evaluation
        train = train & ~leaked
        if not train.any():
            raise UserError("--drop_leaked leaves no training row: all have the prompt of an evaluation row")
    return Selection(train, evaluation, duplicate, leaked, dropped)


def sample(indices: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random sample of at most `size` of the indices, sorted."""
    return np.sort(rng.permutation(indices)[:size])


def _repeats(digest: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The rows of `among` (bool [R]) that have the digest of an earlier row of them, bool [R]."""
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


def weights_of_ratios(ratios: Sequence[float], amounts: Sequence[int]) -> list[float]:
    """How often the rows of each source are seen, so that the sources stand in these ratios and none is repeated.

    The largest weight is 1, of the source that is the scarcest for its ratio: w_i = r_i / a_i · min_j (a_j / r_j).

    Args:
        ratios: at least 0, and not all 0.
        amounts: rows or tokens of each source; above 0 where its ratio is.
    """
    pairs = list(zip(ratios, amounts, strict=True))
    r, a = min((pair for pair in pairs if pair[0]), key=lambda pair: pair[1] / pair[0])
    return [min(1.0, (ratio * a) / (amount * r)) if ratio else 0.0 for ratio, amount in pairs]


def mix_files(file: np.ndarray, length: np.ndarray, files: list[DataFile], config: DataConfig) -> list[DataFile]:
    """The files with the weights that --mix says; the same files without it.

    Args:
        file, length: the file of each training row, and its tokens, int32 [N].

    Raises:
        UserError: an entry of --data_files has a ratio and no row to train on.
    """
    ratios = config.mix_ratios
    if not ratios:
        return files
    entry = np.array([-1 if f.entry is None else f.entry for f in files])[file]
    sizes = np.ones_like(length) if config.mix_by == "rows" else length
    amounts = [int(sizes[entry == i].sum()) for i in range(len(ratios))]
    empty = [printable(config.data_files[i]) for i, ratio in enumerate(ratios) if ratio and not amounts[i]]
    if empty:
        raise UserError(f"--mix {config.mix}: no row to train on in {', '.join(empty)}; give it 0, or leave it out")
    weights = weights_of_ratios(ratios, amounts)
    return [f if f.entry is None else replace(f, weight=weights[f.entry]) for f in files]


def mix(file: np.ndarray, files: list[DataFile], seed: int) -> np.ndarray | None:
    """The training rows of an epoch, int64 indices: row i as often as the weight of its file says; None if all are 1.

    A weight of 2.5 means every row twice, and a random half of the rows once more. The half is of all rows of an entry
    of --data_files (without --mix, of all that have one weight), so that many small files are drawn like a large one.

    Args:
        file: int32 [N], the file of each training row.
    """
    if all(f.weight == 1 for f in files):
        return None
    rng = np.random.default_rng(seed)
    copies = np.zeros(len(file), dtype=np.int64)
    group_of = [(data_file.entry, data_file.weight) for data_file in files]
    for group in dict.fromkeys(group_of):
        _, weight = group
        own = np.flatnonzero(np.array([of_file == group for of_file in group_of])[file])
        copies[own] = int(weight)
        copies[sample(own, round(len(own) * (weight % 1)), rng)] += 1
    if not copies.any():
        raise UserError(f"--data_weights {[f.weight for f in files]} leave no row to train on")
    return np.repeat(np.arange(len(file)), copies)
