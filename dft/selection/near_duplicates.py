"""The command near-dedup: of rows that share most of their text, that with the longest compared text is kept.

Rows are compared as sets of shingles (runs of words) by their Jaccard similarity J = |A ∩ B| / |A ∪ B|. A. Broder's
MinHash (On the resemblance and containment of documents, 1997) estimates it: the share of num_perm random orders in
which both sets have the same smallest element. Its standard deviation is at most √(J(1 − J) / num_perm), 0.042 at
J = 0.65. Bands of these minima, hashed, find candidates without comparing all pairs (locality-sensitive hashing); a
row is dropped only if the estimate from all minima reaches the threshold.

The defaults: with e edits in each word, a shingle of k words is unchanged with probability s = (1 − e)^k, and then
J = s / (2 − s). 5 edits in 100 words leave J = 0.75 of shingles of 3 words and 0.63 of those of 5 (a bit more where
words are inserted, which breaks fewer shingles). The estimate scatters by 0.04, and rows of few words by more, so a
threshold of 0.65 with shingles of 3 words finds nearly all of these; it is what about 8 edits in 100 words leave.
Unrelated rows of one language share a few percent.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dft.errors import UserError
from dft.printable import printable
from dft.reading.rows import Conversation
from dft.selection.extra import missing_package
from dft.selection.method import KEPT, Command, Decide, Decision, Verdict
from dft.selection.shingles import in_batches, shingles, text_of, tokenize

PARTS = ("all", "user", "assistant")
FOUND = 0.98  # probability with which a pair of rows at the threshold becomes a candidate
MAX_BUCKET = 64  # kept rows of one band that a row is compared with, so that templates don't take quadratic time
MAX_SHINGLE, MAX_PERM = 100, 4096


@dataclass(frozen=True)
class NearDedupConfig:
    """Settings of near-dedup."""

    threshold: float = 0.65  # estimated Jaccard similarity from which two rows are near-duplicates
    shingle: int = 3  # words, or characters of a script without spaces
    num_perm: int = 128  # minima of a row, 4 bytes each
    part: str = "all"  # what is compared: all messages but the system's, or those of one role
    seed: int = 42  # of the random orders

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise UserError(f"--threshold is {self.threshold}: give a similarity above 0 and at most 1")
        if not 1 <= self.shingle <= MAX_SHINGLE:
            raise UserError(f"--shingle is {self.shingle}: give 1 to {MAX_SHINGLE} words")
        if not 16 <= self.num_perm <= MAX_PERM:
            raise UserError(f"--num_perm is {self.num_perm}: give 16 to {MAX_PERM}")
        if self.part not in PARTS:
            raise UserError(f"--part is {self.part}: give one of {', '.join(PARTS)}")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed is {self.seed}: give a whole number from 0 to 2^64 - 1")


@dataclass
class Cluster:
    """Rows that are near-duplicates of one that is kept, by their places among all rows."""

    kept: int
    members: list[int] = field(default_factory=list)  # without the kept one
    similarities: list[float] = field(default_factory=list)  # of each to the kept one, estimated


def near_duplicates(rows: Iterable[Conversation], config: NearDedupConfig | None = None) -> list[Cluster]:
    """The clusters of near-duplicates, in the order of the rows that are kept.

    Every member is similar to the kept row itself, not only to another member.

    Raises:
        UserError: rensa isn't installed.
    """
    config = config or NearDedupConfig()
    lengths: list[int] = []

    def texts() -> Iterator[str]:
        for row in rows:
            text = text_of(row, config.part)
            lengths.append(len(text))
            yield text

    minima, is_empty = _signatures(texts(), config)
    return _clusters(minima, is_empty, np.array(lengths, dtype=np.int64), config.threshold)


# ---- signatures ---------------------------------------------------------------------------------


def _signatures(texts: Iterable[str], config: NearDedupConfig) -> tuple[np.ndarray, np.ndarray]:
    """The minima of each text, uint32 [R, num_perm], and whether it has no word, bool [R]."""
    sketch = _sketch()
    minima, is_empty = [np.zeros((0, config.num_perm), np.uint32)], [np.zeros(0, bool)]
    for batch in in_batches(texts):
        hashes = shingles(tokenize(batch), config.shingle)
        matrix = sketch.digest_matrix_from_flat_token_hashes(
            hashes.values, hashes.offsets.tolist(), config.num_perm, config.seed
        )
        minima.append(np.array(matrix.to_rows(), dtype=np.uint32))
        is_empty.append(np.diff(hashes.offsets) == 0)
    return np.concatenate(minima), np.concatenate(is_empty)


def _sketch():
    """The class of rensa that computes minima."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise missing_package("near-dedup", "rensa") from error
    return RMinHash


# ---- clusters -----------------------------------------------------------------------------------


def rows_per_band(threshold: float, num_perm: int) -> int:
    """How many minima a band has: the most with which a pair at the threshold is a candidate with probability FOUND.

    A pair is a candidate if one of num_perm / r bands of r minima is the same: 1 - (1 - J^r)^(num_perm / r).
    """
    sizes = [r for r in range(1, num_perm + 1) if 1 - (1 - threshold**r) ** (num_perm // r) >= FOUND]
    return max(sizes, default=1)


def _clusters(minima: np.ndarray, is_empty: np.ndarray, lengths: np.ndarray, threshold: float) -> list[Cluster]:
    """Goes from the longest row to the shortest: each joins the most similar kept row, or is kept itself.

    Args:
        minima: uint32 [R, P]. is_empty: bool [R], rows that are kept and not compared.
        lengths: int64 [R], in characters; of equally long rows the first is kept.
    """
    size = rows_per_band(threshold, minima.shape[1])
    bands = [slice(start, start + size) for start in range(0, minima.shape[1] - size + 1, size)]
    compared = np.flatnonzero(_shares_a_band(minima, bands) & ~is_empty)
    compared = compared[np.argsort(-lengths[compared], kind="stable")]
    keys = np.stack([_band_keys(minima[compared, band]) for band in bands], axis=1)  # uint64 [C, bands]
    buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in bands]
    cluster_of: dict[int, Cluster] = {}
    for row, own_keys in zip(compared.tolist(), keys, strict=True):
        own = [bucket[key] for bucket, key in zip(buckets, own_keys.tolist(), strict=True)]
        candidates = np.fromiter(set().union(*own), dtype=np.int64)
        similarities = (minima[candidates] == minima[row]).mean(axis=1)
        if len(candidates) and similarities.max() >= threshold:
            best = candidates[similarities == similarities.max()].min()  # so that it doesn't depend on a set's order
            cluster = cluster_of.setdefault(int(best), Cluster(int(best)))
            cluster.members.append(row)
            cluster.similarities.append(float(similarities.max()))
        else:
            for bucket in own:
                if len(bucket) < MAX_BUCKET:
                    bucket.append(row)
    return [cluster_of[row] for row in sorted(cluster_of)]


def _shares_a_band(minima: np.ndarray, bands: list[slice]) -> np.ndarray:
    """Whether some other row has the same minima in one of the bands, bool [R]: all others need no comparison."""
    shares = np.zeros(len(minima), dtype=bool)
    for band in bands:
        keys = _band_keys(minima[:, band])
        order = np.argsort(keys)
        is_next = keys[order][1:] == keys[order][:-1]
        shares[order[1:][is_next]] = True
        shares[order[:-1][is_next]] = True
    return shares


def _band_keys(minima: np.ndarray) -> np.ndarray:
    """One number for the minima of a band, uint64 [R]. Two bands that share one by chance cost a comparison."""
    keys = np.zeros(len(minima), dtype=np.uint64)
    for column in minima.T:
        keys = (keys ^ (keys >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + column
    return keys


# ---- the command --------------------------------------------------------------------------------


def near_dedup(config: NearDedupConfig) -> Decide:
    """The method of near-dedup.

    Raises:
        UserError: rensa isn't installed.
    """
    _sketch()

    def decide(rows: Iterator[Conversation]) -> Decision:
        places: list[tuple[str, int]] = []

        def noted() -> Iterator[Conversation]:
            for row in rows:
                places.append((row.path, row.line))
                yield row

        clusters = near_duplicates(noted(), config)
        return _decision(clusters, places)

    return decide


def _decision(clusters: list[Cluster], places: list[tuple[str, int]]) -> Decision:
    verdicts = [KEPT] * len(places)
    scores = np.full(len(places), np.nan)
    table = []
    for cluster in clusters:
        path, line = places[cluster.kept]
        members = []
        for row, similarity in zip(cluster.members, cluster.similarities, strict=True):
            detail = f"estimated Jaccard similarity {similarity:.2f} to {printable(path)}:{line}, which is kept"
            verdicts[row] = Verdict("near_duplicate", detail, similarity)
            scores[row] = similarity
            members.append({"path": places[row][0], "line": places[row][1], "jaccard": round(similarity, 4)})
        table.append({"size": len(members) + 1, "kept": {"path": path, "line": line}, "members": members})
    table.sort(key=lambda item: -item["size"])
    dropped = sum(len(cluster.members) for cluster in clusters)
    note = f"{len(clusters):,} clusters of near-duplicates, {dropped:,} rows of them are dropped; see clusters.jsonl."
    facts = {"clusters": len(clusters), "largest_cluster": max((item["size"] for item in table), default=0)}
    title = "Estimated similarity of the rows that are dropped"
    return Decision(verdicts, {title: scores}, {"clusters.jsonl": table}, facts, [note])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    default = NearDedupConfig
    add = parser.add_argument
    add("--threshold", type=float, default=default.threshold, help=f"similarity; by default {default.threshold}")
    add("--shingle", type=int, default=default.shingle, help=f"words of a shingle; by default {default.shingle}")
    add("--num_perm", type=int, default=default.num_perm, help=f"minima of a row; by default {default.num_perm}")
    add("--part", choices=PARTS, default=default.part, help="messages that are compared; by default all")
    add("--seed", type=int, default=default.seed, help=f"of the random orders; by default {default.seed}")


def _method(args: argparse.Namespace) -> Decide:
    return near_dedup(NearDedupConfig(args.threshold, args.shingle, args.num_perm, args.part, args.seed))


COMMAND = Command("near-dedup", "keep one of rows that are nearly the same", __doc__, _add_arguments, _method)
