"""How fast scripts/select_data.py finds near-duplicates and contaminated rows, and how many of those planted it finds.

    python benchmarks/select_text.py            # writes benchmarks/results/select_text.md and .json
    python benchmarks/select_text.py --quick    # few rows, under 2 minutes, writes nothing

Rows are random words with the frequencies of a language, of 220 words (about 300 tokens) and of 60. A tenth of them is
there twice, the second time with 5 edits in a hundred words: substitutions, insertions, deletions. Peers, on the same
shingles: MinHash and LSH of datasketch, if it is installed, and of rensa without our hashing of words. Speeds are of
one core, from rows in memory.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from benchmarks.measuring import facts, installed, keep, markdown_table, surroundings

os.environ["RAYON_NUM_THREADS"] = "1"  # before rensa starts its threads

from dft.reading.rows import Conversation  # noqa: E402
from dft.selection.contamination import contaminated_rows  # noqa: E402
from dft.selection.near_duplicates import NearDedupConfig, near_duplicates, rows_per_band  # noqa: E402
from dft.selection.shingles import shingles, text_of, tokenize  # noqa: E402

VOCABULARY = 20_000
EDITS = 5  # in a hundred words


class Words:
    """Random words, whose frequencies fall with their rank as those of a language do."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.vocabulary = ["".join(self.rng.choices(letters, k=self.rng.randint(2, 9))) for _ in range(VOCABULARY)]
        self._weights = list(accumulate(1 / (rank + 10) for rank in range(VOCABULARY)))

    def draw(self, count: int) -> list[str]:
        return self.rng.choices(self.vocabulary, cum_weights=self._weights, k=count)

    def edited(self, words: list[str]) -> list[str]:
        """The words with EDITS substitutions, insertions and deletions in a hundred."""
        words = list(words)
        for _ in range(round(len(words) * EDITS / 100)):
            place, action = self.rng.randrange(len(words)), self.rng.randrange(3)
            words[place : place + (action != 1)] = self.draw(1) if action < 2 else []
        return words


def as_row(words: list[str], line: int) -> Conversation:
    messages = [
        {"role": "user", "content": " ".join(words[: len(words) // 3])},
        {"role": "assistant", "content": " ".join(words[len(words) // 3 :])},
    ]
    return Conversation(messages, None, None, "rows", line, "")


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of this process, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


# ---- near-duplicates ----------------------------------------------------------------------------


def ours(rows: list[Conversation]) -> list[set[int]]:
    """Pairs of a row that is kept and one that is dropped."""
    return [{cluster.kept, member} for cluster in near_duplicates(rows) for member in cluster.members]


def datasketch_pairs(rows: list[Conversation]) -> list[set[int]]:
    """The same by datasketch: each row is looked up among those before it."""
    from datasketch import MinHash, MinHashLSH

    config = NearDedupConfig()
    size = rows_per_band(config.threshold, config.num_perm)
    index = MinHashLSH(num_perm=config.num_perm, params=(config.num_perm // size, size))
    sketches: list[Any] = []
    pairs = []
    for i, row in enumerate(rows):
        words = text_of(row).lower().split()
        sketch = MinHash(num_perm=config.num_perm, seed=config.seed)
        sketch.update_batch([" ".join(words[j : j + 3]).encode() for j in range(len(words) - 2)])
        found = [j for j in index.query(sketch) if sketch.jaccard(sketches[j]) >= config.threshold]
        pairs += [{i, j} for j in found[:1]]
        sketches.append(sketch)
        if not found:
            index.insert(i, sketch)
    return pairs


def rensa_pairs(rows: list[Conversation]) -> list[set[int]]:
    """The same by rensa's own deduplicator, on shingles that Python joins."""
    from rensa import RMinHash, RMinHashDeduplicator

    config = NearDedupConfig()
    size = rows_per_band(config.threshold, config.num_perm)
    index = RMinHashDeduplicator(
        threshold=config.threshold, num_perm=config.num_perm, use_lsh=True, num_bands=config.num_perm // size
    )
    pairs = []
    for i, row in enumerate(rows):
        words = text_of(row).lower().split()
        sketch = RMinHash(num_perm=config.num_perm, seed=config.seed)
        sketch.update([" ".join(words[j : j + 3]) for j in range(len(words) - 2)])
        found = index.get_duplicates(sketch)
        pairs += [{i, int(j)} for j in found[:1]]
        if not found:
            index.add(str(i), sketch)
    return pairs


def near_duplicate_result(
    find: Callable[[list[Conversation]], list[set[int]]], num_rows: int, num_words: int, seed: int
) -> dict[str, float]:
    """Rows a second, the share of planted pairs that is found, and the share of independent rows that is dropped."""
    words = Words(seed)
    originals = [words.draw(num_words) for _ in range(num_rows)]
    copies = [words.edited(text) for text in originals[: num_rows // 10]]
    rows = [as_row(text, line) for line, text in enumerate(originals + copies)]
    seconds, pairs = seconds_of(lambda: find(rows))
    planted = {frozenset((i, num_rows + i)) for i in range(len(copies))}
    found = {frozenset(pair) for pair in pairs}
    return {
        "rows_per_second": len(rows) / seconds,
        "found": len(found & planted) / len(planted),
        "wrongly_dropped": len(found - planted) / num_rows,
    }


def where_time_goes(num_rows: int, num_words: int) -> dict[str, float]:
    """Microseconds a row of the steps until the signature."""
    words = Words(0)
    texts = [text_of(as_row(words.draw(num_words), 0)) for _ in range(num_rows)]
    batches = [texts[i : i + 100] for i in range(0, num_rows, 100)]
    tokenizing, tokens = seconds_of(lambda: [tokenize(batch) for batch in batches])
    shingling, hashes = seconds_of(lambda: [shingles(batch, 3) for batch in tokens])
    from rensa import RMinHash

    sketch = RMinHash.digest_matrix_from_flat_token_hashes
    sketching, matrices = seconds_of(lambda: [sketch(h.values, h.offsets.tolist(), 128, 42) for h in hashes])
    copying, _ = seconds_of(lambda: [matrix.to_rows() for matrix in matrices])
    steps = {"words": tokenizing, "shingles": shingling, "minima": sketching, "minima to Python": copying}
    return {name: seconds / num_rows * 1e6 for name, seconds in steps.items()}


# ---- contamination ------------------------------------------------------------------------------


def contamination_result(num_rows: int, num_words: int) -> dict[str, float]:
    """The same measures, where a tenth of the rows holds 13 to 40 words of an evaluation row."""
    words = Words(1)
    evaluation = [as_row(words.draw(num_words), line) for line in range(num_rows // 10)]
    rows = [as_row(words.draw(num_words), line) for line in range(num_rows)]
    planted = set()
    for row, source in enumerate(evaluation):
        message = source.messages[words.rng.randrange(2)]["content"].split()
        length = words.rng.randint(13, min(40, len(message)))
        start = words.rng.randrange(len(message) - length + 1)
        rows[row].messages[1]["content"] += " " + ", ".join(message[start : start + length]).title()
        planted.add((row, source.line))
    seconds, matches = seconds_of(lambda: contaminated_rows(rows, evaluation))
    found = {(match.row, match.evaluation) for match in matches}
    return {
        "rows_per_second": num_rows / seconds,
        "found": len(found & planted) / len(planted),
        "wrongly_dropped": len(found - planted) / num_rows,
    }


# ---- the table ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows; writes nothing")
    args = parser.parse_args()
    num_rows, peer_rows = (10_000, 1_000) if args.quick else (100_000, 10_000)
    near_duplicates([as_row(Words(2).draw(50), 0)])  # tables that are made once
    results = {}
    for num_words in (220, 60):
        results[f"near-dedup, {num_words} words"] = near_duplicate_result(ours, num_rows, num_words, seed=0)
    results["rensa alone, 220 words"] = near_duplicate_result(rensa_pairs, peer_rows, 220, seed=0)
    if installed("datasketch"):
        results["datasketch, 220 words"] = near_duplicate_result(datasketch_pairs, peer_rows, 220, seed=0)
    results["contamination, 220 words"] = contamination_result(num_rows, 220)
    lines = [("", "rows/s", "planted found", "others dropped")]
    for name, result in results.items():
        shares = (f"{result['found']:.2%}", f"{result['wrongly_dropped']:.3%}")
        lines.append((name, f"{result['rows_per_second']:,.0f}", *shares))
    steps = where_time_goes(min(num_rows, 20_000), 220)
    about = surroundings(["numpy", "rensa", "datasketch"])
    shown = ", ".join(f"{name} {value:.1f}" for name, value in steps.items())
    text = f"{markdown_table(lines)}\n\nMicroseconds a row of 220 words: {shown}\n\n{facts(about)}"
    print(text)
    own = results["near-dedup, 220 words"]["rows_per_second"]
    ratios = {
        f"near_dedup_vs_{name.split()[0]}": round(own / result["rows_per_second"], 2)
        for name, result in results.items()
        if name.split()[0] in ("rensa", "datasketch")
    }
    if not args.quick:
        keep("select_text", text, {"results": results, "microseconds": steps, **about})
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
