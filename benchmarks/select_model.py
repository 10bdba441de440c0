"""Model-based selection: what IFD finds, how fast it is beside plain loops, and k-center greedy beside plain greedy.

    python benchmarks/select_model.py                # writes benchmarks/results/select_model_cpu.md and .json
    python benchmarks/select_model.py --quick        # under 2 minutes on 2 cores, writes nothing
    python benchmarks/select_model.py --device auto  # speed alone, on a GPU with Qwen3-0.6B's shapes

The last line is JSON:
    planted_in_worst_tenth    share of the rows with another row's answer that are in the tenth of the highest IFD. The
                              model has been trained on other rows: the same facts in other wordings
    ifd_vs_row_by_row         how many times faster than two forward passes of one row at a time with all logits; for
                              chats, and for short rows
    ifd_vs_bare_passes        time of the scoring, with tokenizing and shards, over that of the model's passes alone
    k_center_seconds          for random embeddings
    k_center_vs_plain         how many times faster than a pass over all embeddings for each pick
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.corpus import conversations
from benchmarks.measuring import facts, keep, markdown_table, surroundings, wait_until_quiet
from benchmarks.select_planted import make_rows, train, with_swapped_answers
from benchmarks.train_step_run import SIZES
from dft.chat.format import ChatFormat
from dft.constants import IGNORE_INDEX
from dft.reading.rows import Conversation
from dft.reference.scoring import plan_scoring
from dft.selection.ifd_scores import answer_pairs, ifd_scores
from dft.selection.k_center import k_center_greedy
from dft.selection.scoring_model import ScoringModel, load_scoring_model
from examples.make_tiny_model import make_tokenizer

PACKAGES = ("torch", "transformers", "numpy")
SHARES = (0.1, 0.05)  # of rows with another row's answer
TOKENS_AT_ONCE = 8192
MAX_LENGTH = 1024
VOCABULARY = 16000
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
SPREAD = 0.3  # of the clusters' rows, whose centers have 1


def seconds(work: Callable[[], Any], rounds: int = 1) -> float:
    """The least of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# ---- what IFD finds -----------------------------------------------------------------------------


def planted(directory: Path, epochs: int) -> dict[str, Any]:
    """For each share, the part of the planted rows that is in the worst tenth."""
    train_rows, others = make_rows(seed=0)
    train(train_rows, epochs, directory / "trained")
    model = load_scoring_model(directory / "trained", "cpu")
    result: dict[str, Any] = {"rows": len(others), "epochs": epochs}
    for share in SHARES:
        rows, changed = with_swapped_answers(others, share, seed=1)
        ratio = ifd_scores(rows, model, cache=directory / "shards").ratio
        worst = np.argsort(-ratio, kind="stable")[: round(len(rows) / 10)]
        clean = np.delete(ratio, changed)
        result[f"{share:g}"] = {
            "found": float(np.isin(changed, worst).mean()),
            "planted_from_1": float((ratio[changed] >= 1).mean()),
            "clean_from_1": float((clean >= 1).mean()),
            "medians": [float(np.median(ratio[changed])), float(np.median(clean))],
        }
    return result


# ---- how fast it is -----------------------------------------------------------------------------


def random_model(directory: Path, device: str) -> ScoringModel:
    """Qwen3's architecture with random weights: Qwen3-0.6B's shapes, but small on a processor."""
    texts = (message["content"] for messages in conversations(1000) for message in messages)
    make_tokenizer(texts, VOCABULARY).save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen3Config(**(SMALL if device == "cpu" else SIZES["0.6b"]))
    model = Qwen3ForCausalLM(config)
    (model if device == "cpu" else model.to(torch.bfloat16)).save_pretrained(directory)
    return load_scoring_model(directory, device)


def row_by_row(items: list[dict[str, np.ndarray]], model: ScoringModel) -> None:
    """The plain loop: all logits of one row at a time."""
    with torch.no_grad():
        for item in items:
            ids = torch.tensor(item["input_ids"]).long()[None].to(model.device)
            labels = torch.tensor(item["labels"])[1:].to(model.device)
            log_p = model.model(ids).logits[0, :-1].float().log_softmax(-1)
            is_answer = labels != IGNORE_INDEX
            log_p.gather(1, ids[0, 1:, None])[:, 0][is_answer].mean().item()


def speed(rows: list[Conversation], model: ScoringModel, rounds: int) -> dict[str, Any]:
    """Seconds of the scoring, of the bare passes and of the plain loop, on the same rows."""
    pairs, _ = answer_pairs(rows, ChatFormat(model.tokenizer), MAX_LENGTH)
    items = [item for row, alone in pairs.values() for item in (row, *alone)]
    batches = plan_scoring(np.array([len(item["input_ids"]) for item in items]), TOKENS_AT_ONCE)

    def bare() -> None:
        for batch in batches:
            model.log_p([items[i] for i in batch])

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            ifd_scores(rows, model, max_length=MAX_LENGTH, tokens_at_once=TOKENS_AT_ONCE, cache=Path(cache))

    model.log_p(items[:2])  # the check of the documents is not measured
    return {
        "rows": len(rows),
        "passes": len(items),
        "tokens": sum(len(item["input_ids"]) for item in items),
        "ours": seconds(ours, rounds),
        "bare": seconds(bare, rounds),
        "row_by_row": seconds(lambda: row_by_row(items, model), rounds),
    }


def speeds(directory: Path, num_rows: int, rounds: int, device: str) -> dict[str, Any]:
    """The speed on chats of 600 tokens, and on short rows: on a processor by the model that has learned them."""
    chats = [Conversation(m, None, None, "", i, "") for i, m in enumerate(conversations(num_rows))]
    model = random_model(directory / "random", device)
    facts_model = load_scoring_model(directory / "trained", "cpu") if device == "cpu" else model
    return {
        "chats": speed(chats, model, rounds),
        "short": speed(make_rows(seed=0)[1][: 50 * num_rows], facts_model, rounds),
    }


# ---- k-center greedy ----------------------------------------------------------------------------


def plain_greedy(rows: torch.Tensor, first: int, count: int) -> list[int]:
    """A product with all rows for each pick, in float32."""
    squares = rows.square().sum(1)
    nearest = torch.full((len(rows),), float("inf"))
    picks = [first]
    for _ in range(count):
        distance = squares + squares[picks[-1]] - 2 * (rows @ rows[picks[-1]])
        nearest = torch.minimum(nearest, distance)
        picks.append(int(nearest.argmax()))
    return picks


def k_center(num_rows: int, picks: int, plain_picks: int) -> dict[str, Any]:
    """Seconds for random rows and for clusters; plain greedy's from some picks, as each takes the same time."""
    generator = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {"rows": num_rows, "dimensions": 1024, "picks": picks, "plain_picks": plain_picks}
    for kind in ("random", "clusters"):
        rows = torch.randn(num_rows, 1024, generator=generator)
        if kind == "clusters":
            centers = torch.randn(500, 1024, generator=generator)
            rows = centers[torch.randint(500, (num_rows,), generator=generator)] + SPREAD * rows
        start = time.perf_counter()
        cover = k_center_greedy(rows, picks)
        ours = time.perf_counter() - start
        first = int(cover.picks[0])
        plain = seconds(lambda rows=rows, first=first: plain_greedy(rows, first, plain_picks))
        result[kind] = {"ours": ours, "plain": plain * picks / plain_picks, "radius": cover.radius}
    return result


# ---- results ------------------------------------------------------------------------------------


def speed_ratios(speeds: dict[str, Any]) -> dict[str, float]:
    chats, short = speeds["chats"], speeds["short"]
    return {
        "ifd_vs_row_by_row": round(chats["row_by_row"] / chats["ours"], 3),
        "ifd_vs_row_by_row_short": round(short["row_by_row"] / short["ours"], 3),
        "ifd_vs_bare_passes": round(chats["ours"] / chats["bare"], 3),
        "ifd_vs_bare_passes_short": round(short["ours"] / short["bare"], 3),
    }


def numbers(found: dict[str, Any]) -> dict[str, float]:
    centers = found["k_center"]
    return {
        "planted_in_worst_tenth": round(found["planted"][f"{SHARES[0]:g}"]["found"], 4),
        **speed_ratios(found["speeds"]),
        "k_center_seconds": round(centers["random"]["ours"], 2),
        "k_center_vs_plain": round(centers["random"]["plain"] / centers["random"]["ours"], 2),
    }


def describe(found: dict[str, Any], about: dict[str, Any]) -> str:
    planted, centers = found["planted"], found["k_center"]
    first = [("share of rows with another's answer", "in the worst tenth", "of them from 1", "of the others from 1")]
    for share in SHARES:
        entry = planted[f"{share:g}"]
        shares = (f"{entry[key]:.1%}" for key in ("found", "planted_from_1", "clean_from_1"))
        first.append((f"{share:.0%}", *shares))
    second = [("rows", "tokens", "ifd_scores, s", "the passes alone, s", "row by row, all logits, s")]
    for kind, entry in found["speeds"].items():
        times = (f"{entry[way]:.2f}" for way in ("ours", "bare", "row_by_row"))
        second.append((f"{entry['rows']} {kind}", f"{entry['tokens']:,}", *times))
    third = [("embeddings", "ours, s", "plain greedy, s", "radius")]
    for kind in ("random", "clusters"):
        entry = centers[kind]
        third.append((kind, f"{entry['ours']:.1f}", f"{entry['plain']:.0f}", f"{entry['radius']:.3f}"))
    return "\n\n".join(
        [
            "# Model-based selection: results",
            facts(about),
            f"IFD by a small model that was trained for {planted['epochs']} epochs on the other half of the rows; "
            f"{planted['rows']} rows are scored.",
            markdown_table(first),
            f"Tokens are those of both passes. Chats: a model of 4 layers, vocabulary {VOCABULARY:,}. Short: the "
            "model that was trained, vocabulary 1,000.",
            markdown_table(second),
            f"K-center greedy: {centers['picks']:,} of {centers['rows']:,} embeddings of 1,024 dimensions. Plain "
            f"greedy is measured for {centers['plain_picks']} picks, and each pick takes the same time.",
            markdown_table(third),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of each, no results written")
    parser.add_argument("--epochs", type=int, default=12, help="of the small model's training")
    parser.add_argument("--rows", type=int, default=200, help="conversations whose scoring is timed")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--embeddings", type=int, default=50000)
    parser.add_argument("--picks", type=int, default=5000)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu", help="auto: the GPU, if there is one")
    args = parser.parse_args()
    plain_picks = 200
    if args.quick:
        args.epochs, args.rows, args.rounds, args.embeddings, args.picks, args.patience = 8, 20, 1, 10000, 1000, 2
        plain_picks = 50
    with tempfile.TemporaryDirectory() as name:
        if args.device != "cpu":
            found = speeds(Path(name), args.rows, args.rounds, args.device)
            print(json.dumps(speed_ratios(found) | {"found": found}))
            return
        found = {}
        for part, work in {
            "k_center": lambda: k_center(args.embeddings, args.picks, plain_picks),
            "planted": lambda: planted(Path(name), args.epochs),
            "speeds": lambda: speeds(Path(name), args.rows, args.rounds, args.device),
        }.items():
            wait_until_quiet(args.patience)
            found[part] = work()
            print(part, json.dumps(found[part]), flush=True)
    about = surroundings(PACKAGES)
    result = numbers(found)
    text = describe(found, about)
    print(text)
    if not args.quick:
        keep("select_model_cpu", text, about | {"ratios": result, "found": found})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
