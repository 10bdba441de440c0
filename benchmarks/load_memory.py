"""How much memory preparing a large file takes: one of JSON lines, and one that is a single JSON array.

    pip install -e .[bench] -c constraints.txt
    python benchmarks/load_memory.py            # files of 1 GB; writes benchmarks/results/load_memory.md and .json
    python benchmarks/load_memory.py --quick    # files of 40 MB, under 2 minutes, writes nothing

The file is made in a temporary directory and deleted. prepare_data runs in a process of its own; that one
and its workers are looked at 10 times a second. Resident memory (RSS) counts pages that processes share in
each of them; the proportional set (PSS) counts them once. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chat_tokenizer import make_tokenizer, vocabulary_file
from benchmarks.corpus import conversations
from benchmarks.measuring import facts, keep, markdown_table, surroundings

PACKAGES = ("tokenizers", "transformers", "datasets", "pyarrow", "numpy", "torch")
SHAPES = {"jsonl": "one object a line", "json": "one array"}
DIFFERENT_ROWS = 10_000  # repeated, each time behind another number
MIB = 2**20


def write_file(path: Path, size: int) -> int:
    """Writes conversations until the file is of `size` bytes; returns how many."""
    different = list(conversations(DIFFERENT_ROWS))
    is_array = path.suffix == ".json"
    number = 0
    with open(path, "wb") as file:
        while file.tell() < size:
            row = {"number": number, "messages": different[number % DIFFERENT_ROWS]}
            text = json.dumps(row, ensure_ascii=False)
            file.write((("[\n" if number == 0 else ",\n") + text if is_array else text + "\n").encode())
            number += 1
        file.write(b"\n]\n" if is_array else b"")
    return number


def prepare(path: Path, num_proc: int) -> None:
    """In the process that is looked at: says its memory before, prepares, says what it made."""
    from transformers import AutoTokenizer

    from data_utils import prepare_data
    from dft.chat.format import ChatFormat
    from dft.config.data import DataConfig

    chat_format = ChatFormat(AutoTokenizer.from_pretrained(path.parent / "tokenizer"))
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    config = DataConfig(
        [str(path)],
        validation_split_percentage=0,
        preprocessing_num_workers=num_proc,
        data_cache_dir=str(path.parent / "cache"),
    )
    data = prepare_data(config, chat_format, progress=False)
    seconds = time.perf_counter() - start
    total = data.report["total"]
    print(
        json.dumps({"before": before, "seconds": seconds, "rows": total["rows_read"], "tokens": total["tokens"]}),
        flush=True,
    )


def watch(command: list[str]) -> dict[str, Any]:
    """Runs a command; returns the JSON it prints last, and the most memory that it and its children had, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = {"main_rss": 0, "workers_rss": 0, "all_rss": 0, "all_pss": 0}
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [root, *root.children(recursive=True)]
            rss, pss = zip(*((info.rss, info.pss) for info in (p.memory_full_info() for p in family)), strict=True)
        except psutil.Error:  # one of them has just ended
            continue
        now = {"main_rss": rss[0], "workers_rss": sum(rss[1:]), "all_rss": sum(rss), "all_pss": sum(pss)}
        most = {name: max(most[name], now[name]) for name in most}
        time.sleep(0.1)
    assert process.stdout is not None
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return most | json.loads(process.stdout.read().splitlines()[-1])


def measure(shape: str, size: int, num_proc: int) -> dict[str, Any]:
    """Makes a file, prepares it, and deletes it."""
    with tempfile.TemporaryDirectory(prefix="load-memory-") as directory:
        path = Path(directory) / f"rows.{shape}"
        make_tokenizer(path.parent / "tokenizer")
        rows = write_file(path, size)
        command = [sys.executable, __file__, "--prepare", str(path), "--num_proc", str(num_proc)]
        result = watch(command) | {"shape": shape, "processes": num_proc, "bytes": path.stat().st_size}
    assert result["rows"] == rows, f"{result['rows']} rows read of {rows}"
    return result


def describe(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Everything that is known, for people."""
    header = ("file", "rows", "tokens", "workers", "seconds", "before", "main", "all workers", "all, RSS", "all, PSS")
    lines: list[tuple[str, ...]] = [header]
    for result in results:
        memory = ("before", "main_rss", "workers_rss", "all_rss", "all_pss")
        lines.append(
            (
                f"{result['bytes'] / 1e9:.2f} GB, {SHAPES[result['shape']]}",
                f"{result['rows']:,}",
                f"{result['tokens']:,}",
                str(result["processes"] if result["processes"] > 1 else 0),
                f"{result['seconds']:.0f}",
                *(f"{result[name] / MIB:,.0f}" for name in memory),
            )
        )
    return "\n\n".join(
        [
            "# Memory of preparing large files: results",
            facts(about),
            "The most memory at any time, in MiB.",
            markdown_table(lines),
            """\
- before: the main process with its imports (torch is among them) and the tokenizer, before prepare_data.
- RSS counts shared pages in every process, PSS once. Both count pages of the written Arrow file that are mapped into
  memory, which the system can take back.
- The tokenizer has 131,072 tokens.""",
            "## Doubt",
            f"""\
- {DIFFERENT_ROWS:,} different conversations are repeated, so the seconds are those of easy data. The memory doesn't
  depend on it: caches of words and texts are bounded.
- Looked at 10 times a second: shorter peaks are missed.""",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files, no results written")
    parser.add_argument("--megabytes", type=int, help="size of each file (default 1000; quick 40)")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[2], help="processes; 1 is without workers")
    parser.add_argument(
        "--prepare", type=Path, metavar="FILE", help="only prepare FILE, as the process looked at does"
    )
    args = parser.parse_args()
    if args.prepare is not None:
        prepare(args.prepare, args.num_proc[0])
        return
    if vocabulary_file() is None:
        parser.error("the vocabulary of mistral-common is needed: pip install -e .[bench] -c constraints.txt")
    size = (args.megabytes or (40 if args.quick else 1000)) * 1_000_000
    results = []
    for shape in SHAPES:
        for num_proc in args.num_proc:
            results.append(measure(shape, size, num_proc))
            print(f"{shape}, {num_proc} processes: {results[-1]}", file=sys.stderr, flush=True)
    about = surroundings(PACKAGES)
    text = describe(results, about)
    print(text)
    if not args.quick:
        keep("load_memory", text, about | {"found": results})
    most = {
        f"{r['shape']}_{r['processes']}_{name}_mib": round(r[f"all_{name}"] / MIB)
        for r in results
        for name in ("rss", "pss")
    }
    print(json.dumps(most))


if __name__ == "__main__":
    main()
