"""How long preparing data takes, beside the tokenizer alone, Lauorie/DFT's recipe and TRL's SFTTrainer.

    pip install -e .[bench] -c constraints.txt
    python benchmarks/data_prep.py            # writes benchmarks/results/data_prep.md and .json
    python benchmarks/data_prep.py --quick    # a small corpus, under 2 minutes on 2 cores, writes nothing

Every measurement is a process of its own (data_prep_steps.py), the ways take turns, and the median of the
rounds counts. The last line is JSON: "ours_vs_X" is how many times as fast as X we are, so above 1 we are
faster; _1 and _2 are processes; shared_prompt: all rows begin with one system prompt of 500 tokens.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chat_tokenizer import make_tokenizer, vocabulary_file
from benchmarks.corpus import conversations, write_jsonl
from benchmarks.measuring import MAX_OTHERS, facts, installed, keep, markdown_table, run_measured, surroundings

STEPS = Path(__file__).parent / "data_prep_steps.py"
PACKAGES = ("tokenizers", "transformers", "datasets", "pyarrow", "numpy", "torch", "trl", "mistral-common")
SHARED_PROMPT_WORDS = 260  # about 500 tokens
NAMES = {
    "limit": "the tokenizer alone, encode_batch",
    "limit_fast": "the tokenizer alone, encode_batch_fast",
    "ours": "prepare_data",
    "cached": "prepare_data, from its cache",
    "seed": "Lauorie/DFT's recipe",
    "trl": "TRL's SFTTrainer",
}
CORPORA = {
    "plain": "Conversations that share nothing",
    "shared": "Conversations behind one system prompt of about 500 tokens",
}
Case = tuple[str, str, int]  # corpus, way, processes


def cases(quick: bool, with_trl: bool) -> list[Case]:
    """What is measured in each round; `cached` needs `ours` before it."""
    peers = ["seed", "trl"] if with_trl else ["seed"]
    alone = ["limit", "ours", "cached", *peers]
    if quick:
        ways = {("plain", 1): alone, ("shared", 1): ["limit", "ours"], ("plain", 2): ["limit", "ours"]}
    else:
        ways = {("plain", 1): ["limit_fast", *alone], ("plain", 2): ["limit", "ours", *peers]}
        ways |= {("shared", num_proc): ["limit", "ours"] for num_proc in (1, 2)}
    return [(corpus, way, num_proc) for (corpus, num_proc), some in ways.items() for way in some]


def measure(
    work: Path, todo: list[Case], rounds: int, patience: float, tries: int
) -> dict[Case, list[dict[str, Any]]]:
    """All measurements of all cases."""
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in todo}
    for number in range(rounds):
        for corpus, way, num_proc in todo:
            command = [sys.executable, str(STEPS), way, "--work", str(work), "--corpus", corpus]
            result = run_measured([*command, "--num_proc", str(num_proc)], patience, tries)
            found[corpus, way, num_proc].append(result)
            print(
                f"round {number + 1}/{rounds}  {corpus:6}  {way:10}  {num_proc} processes  "
                f"{result['seconds']:7.2f} s  others {result['others']:.0%}",
                file=sys.stderr,
                flush=True,
            )
    return found


def check_same_work(found: dict[Case, list[dict[str, Any]]]) -> None:
    """Stops unless all ways made the same tokens, and the ones that mask assistants the same labels."""
    for corpus in CORPORA:
        results = [r for (c, _, _), some in found.items() if c == corpus for r in some]
        ids = {(r["rows"], r["tokens"], r["ids"]) for r in results}
        assert len(ids) == 1, f"{corpus}: not the same tokens: {ids}"
        labels = {r["labels"] for (c, w, _), some in found.items() if c == corpus and w in LABELED for r in some}
        assert len(labels) == 1, f"{corpus}: not the same labels: {labels}"


LABELED = ("ours", "cached", "trl")


def seconds_of(found: dict[Case, list[dict[str, Any]]], case: Case, key: str = "seconds") -> float:
    return median(result[key] for result in found[case])


def ratios(found: dict[Case, list[dict[str, Any]]]) -> dict[str, float]:
    """The last line: speed of ours over speed of the others, and the seconds of a second start."""
    result: dict[str, float] = {}
    for corpus, way, num_proc in found:
        if way in ("ours", "cached"):
            continue
        prefix = "shared_prompt_" if corpus == "shared" else ""
        speed = seconds_of(found, (corpus, way, num_proc)) / seconds_of(found, (corpus, "ours", num_proc))
        result[f"{prefix}ours_vs_{way}_{num_proc}"] = round(speed, 3)
    result["cached_seconds"] = round(seconds_of(found, ("plain", "cached", 1)), 3)
    result["cached_seconds_with_imports"] = round(seconds_of(found, ("plain", "cached", 1), "since_start"), 3)
    return result


def table(found: dict[Case, list[dict[str, Any]]], corpus: str) -> str:
    lines: list[tuple[str, ...]] = [
        ("", "processes", "seconds", "least–most", "processor seconds", "× tokenizer alone", "tokens/s")
    ]
    for (c, way, num_proc), results in found.items():
        if c != corpus:
            continue
        seconds = seconds_of(found, (c, way, num_proc))
        all_seconds = [result["seconds"] for result in results]
        ratio = seconds / seconds_of(found, (c, "limit", num_proc))
        lines.append(
            (
                NAMES[way],
                str(num_proc),
                f"{seconds:.2f}",
                f"{min(all_seconds):.2f}–{max(all_seconds):.2f}",
                f"{seconds_of(found, (c, way, num_proc), 'cpu_seconds'):.2f}",
                f"{ratio:.2f}",
                f"{results[0]['tokens'] / seconds:,.0f}" if way != "cached" else "",
            )
        )
    return markdown_table(lines)


def describe(found: dict[Case, list[dict[str, Any]]], about: dict[str, Any], rounds: int) -> str:
    """Everything that is known, for people."""
    parts = ["# Data preparation: results", facts(about)]
    for corpus, title in CORPORA.items():
        some = found[corpus, "ours", 1][0]
        size = f"{some['rows']:,} rows, {some['tokens']:,} tokens, {some['supervised']:,} of them supervised"
        parts += [f"## {title}", f"{size}; median of {rounds} rounds.", table(found, corpus)]
    cached, limit = found["plain", "cached", 1], found["plain", "limit", 1]
    others = [result["others"] for results in found.values() for result in results]
    speed = [f"- {name.replace('_', ' ')}: {value}" for name, value in ratios(found).items()]
    rendering = median(result["render_seconds"] for result in limit)
    loading, construction = (median(result[key] for result in cached) for key in ("loading", "construction"))
    per_row = limit[0]["tokens"] / limit[0]["rows"]
    parts += [
        "## Ratios",
        "ours vs X is how many times as fast as X ours is; 1 and 2 are processes.",
        "\n".join(speed),
        "## What is in the seconds",
        f"""\
- The tokenizer alone: one call for all texts, which were read and rendered before ({rendering:.2f} s for the
  rendering); the tokens stay in memory. With two processes: its own two threads.
- The others: from the JSONL file to token ids and labels on the disk. Nothing is in a cache but the file in memory.
- Imports, loading the tokenizer ({loading:.2f} s) and looking at its template ({construction:.2f} s) count for nobody.
- Lauorie/DFT's recipe is written after its description. Its tokens are the same; it supervises all that follows the
  first question, so its labels are not.
- TRL: reading with `datasets`, and what the constructor of SFTTrainer does to the data, with `assistant_only_loss`, a
  template with generation tags and the same max_length. The rest of the constructor doesn't count.
- One process: no worker beside the main one. Two: two workers.
- Checked in every round: all made the same token ids, ours and TRL the same labels.""",
        "## Doubt",
        f"""\
- The conversations are invented: {per_row:.0f} tokens a row, words made of morphemes with Zipf's frequencies, numbers,
  lists, code and Chinese. How often words repeat decides much of our speed, and real text repeats itself otherwise.
- Other programs ran on the machine. A measurement in which they took more than {MAX_OTHERS:.0%} of it was made again,
  up to twice; in those that count they took {median(others):.1%} (median) and {max(others):.0%} (most).
- One machine, one tokenizer, at most two processes.""",
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small corpus, one round, no results written")
    parser.add_argument("--rows", type=int, help="conversations (default 8000; quick 800)")
    parser.add_argument("--rounds", type=int, help="measurements of each kind (default 5; quick 1)")
    parser.add_argument("--patience", type=float, help="seconds to wait for a quiet machine (default 120; quick 2)")
    args = parser.parse_args()
    if vocabulary_file() is None:
        parser.error("the vocabulary of mistral-common is needed: pip install -e .[bench] -c constraints.txt")
    rows = args.rows or (800 if args.quick else 8000)
    rounds = args.rounds or (1 if args.quick else 5)
    patience = args.patience if args.patience is not None else (2 if args.quick else 120)
    with_trl = installed("trl") is not None
    if not with_trl:
        print("TRL is not installed and is left out: pip install -e .[bench] -c constraints.txt")
    with tempfile.TemporaryDirectory(prefix="data-prep-") as directory:
        work = Path(directory)
        make_tokenizer(work / "tokenizer")
        write_jsonl(work / "plain.jsonl", conversations(rows))
        write_jsonl(work / "shared.jsonl", conversations(rows, system_words=SHARED_PROMPT_WORDS))
        found = measure(work, cases(args.quick, with_trl), rounds, patience, tries=1 if args.quick else 3)
    check_same_work(found)
    about = surroundings(PACKAGES)
    text = describe(found, about, rounds)
    print(text)
    if not args.quick:
        measurements = [
            {"corpus": corpus, "way": way, "processes": num_proc, "measurements": results}
            for (corpus, way, num_proc), results in found.items()
        ]
        keep("data_prep", text, about | {"ratios": ratios(found), "found": measurements})
    print(json.dumps(ratios(found)))


if __name__ == "__main__":
    main()
