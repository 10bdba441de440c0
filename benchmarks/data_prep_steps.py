"""One way of data_prep.py to prepare a corpus, measured in a process of its own; prints one JSON object.

    python benchmarks/data_prep_steps.py ours --work DIR --corpus plain --num_proc 1

DIR holds tokenizer/ and the corpora, as data_prep.py makes them. Seconds are from the files (limit: from
rendered texts in memory) to the tokens with their labels on the disk (limit: tokens in memory). Imports
and loading the tokenizer are not in them.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAX_LENGTH = 8192  # tokens; no row of the corpora is longer


class Clock:
    """Seconds and processor seconds, the latter of this process and of the ones it has waited for."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.cpu_start = self._cpu()

    @staticmethod
    def _cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(some.ru_utime + some.ru_stime for some in used)

    def stop(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.start, "cpu_seconds": self._cpu() - self.cpu_start}


def counts(rows: Iterable[Any], labels: Iterable[Any] | None = None) -> dict[str, Any]:
    """What was made, to compare: rows, tokens, supervised tokens, and digests of the ids and the labels."""
    import numpy as np

    result: dict[str, Any] = {"rows": 0, "tokens": 0}
    digest = hashlib.sha256()
    for row in rows:
        ids = np.asarray(row, dtype=np.int32)
        digest.update(ids.tobytes())
        result["rows"] += 1
        result["tokens"] += len(ids)
    result["ids"] = digest.hexdigest()[:16]
    if labels is not None:
        digest, supervised = hashlib.sha256(), 0
        for row in labels:
            some = np.asarray(row, dtype=np.int32)
            digest.update(some.tobytes())
            supervised += int((some != -100).sum())
        result |= {"supervised": supervised, "labels": digest.hexdigest()[:16]}
    return result


def counts_of_dataset(dataset: Any) -> dict[str, Any]:
    dataset = dataset.with_format("numpy", columns=["input_ids", "labels"])
    return counts((row["input_ids"] for row in dataset), (row["labels"] for row in dataset))


def load_tokenizer(work: Path) -> tuple[Any, float]:
    """The tokenizer, and the seconds that loading takes."""
    from transformers import AutoTokenizer

    start = time.perf_counter()
    return AutoTokenizer.from_pretrained(work / "tokenizer"), time.perf_counter() - start


# ---- the ways -----------------------------------------------------------------------------------


def limit(work: Path, path: Path, num_proc: int, method: str = "encode_batch") -> dict[str, Any]:
    """The tokenizer alone: one call for all texts, rendered before."""
    from dft.reading.raw_rows import read_rows

    tokenizer, _ = load_tokenizer(work)
    rows = [json.loads(row.text)["messages"] for row in read_rows(str(path))]
    start = time.perf_counter()
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    rendering = time.perf_counter() - start
    clock = Clock()
    encodings = getattr(tokenizer.backend_tokenizer, method)(texts, add_special_tokens=False)
    return clock.stop() | {"render_seconds": rendering} | counts(encoding.ids for encoding in encodings)


def limit_fast(work: Path, path: Path, num_proc: int) -> dict[str, Any]:
    """The same without character offsets, which a mask needs."""
    return limit(work, path, num_proc, "encode_batch_fast")


def ours(work: Path, path: Path, num_proc: int) -> dict[str, Any]:
    """prepare_data into an empty cache; leaves the cache behind for `cached`."""
    cache = work / f"cache-{path.stem}-{num_proc}"
    shutil.rmtree(cache, ignore_errors=True)
    return _prepare(work, path, num_proc, cache)


def cached(work: Path, path: Path, num_proc: int) -> dict[str, Any]:
    """prepare_data once more; since_start counts from the start of the process, imports and all."""
    return _prepare(work, path, num_proc, work / f"cache-{path.stem}-{num_proc}")


def _prepare(work: Path, path: Path, num_proc: int, cache: Path) -> dict[str, Any]:
    from data_utils import prepare_data
    from dft.chat.format import ChatFormat
    from dft.config.data import DataConfig

    tokenizer, loading = load_tokenizer(work)
    start = time.perf_counter()
    chat_format = ChatFormat(tokenizer)
    construction = time.perf_counter() - start
    clock = Clock()
    config = DataConfig(
        [str(path)],
        max_length=MAX_LENGTH,
        validation_split_percentage=0,
        preprocessing_num_workers=num_proc,
        data_cache_dir=str(cache),
    )
    data = prepare_data(config, chat_format, progress=False)
    times = clock.stop() | {"since_start": _age(), "loading": loading, "construction": construction}
    return times | counts_of_dataset(data.train)


def _age() -> float:
    """Seconds since this process was started."""
    import psutil

    return time.time() - psutil.Process().create_time()


def seed(work: Path, path: Path, num_proc: int) -> dict[str, Any]:
    """What Lauorie/DFT does, by its description: everything through `datasets`, two tokenizations a row.

    It supervises all that follows the first question. One process: without a worker beside it.
    """
    from datasets import load_dataset

    tokenizer, _ = load_tokenizer(work)

    def is_valid(row: dict[str, Any]) -> bool:
        messages = row["messages"]
        has_keys = all("role" in m and "content" in m for m in messages)
        return bool(messages) and has_keys and any(m["role"] == "assistant" for m in messages)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        result: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
        for messages in batch["messages"]:
            if not is_valid({"messages": messages}):
                continue
            first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            encoded = tokenizer(whole, max_length=MAX_LENGTH, truncation=True)
            prompt = tokenizer.apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt, max_length=MAX_LENGTH, truncation=True)["input_ids"]
            labels = list(encoded["input_ids"])
            for position in range(min(len(prompt_ids), len(labels))):
                labels[position] = -100
            for name, values in zip(result, (encoded["input_ids"], encoded["attention_mask"], labels), strict=True):
                result[name].append(values)
        return result

    clock = Clock()
    raw = load_dataset("json", data_files=str(path), split="train")
    loaded = time.perf_counter() - clock.start
    raw = raw.filter(is_valid).select_columns(["messages"])
    tokens = raw.map(
        tokenize,
        batched=True,
        batch_size=10,
        remove_columns=raw.column_names,
        num_proc=None if num_proc == 1 else num_proc,
        load_from_cache_file=False,
    ).filter(lambda row: len(row["input_ids"]) > 0)
    return clock.stop() | {"json_seconds": loaded} | counts_of_dataset(tokens)


def trl(work: Path, path: Path, num_proc: int) -> dict[str, Any]:
    """TRL's SFTTrainer: reading as JSON, and what its constructor does to the data; not the model, not the rest."""
    import torch
    from datasets import load_dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from benchmarks.chat_tokenizer import TAGGED_TEMPLATE

    tokenizer, _ = load_tokenizer(work)
    tokenizer.chat_template = TAGGED_TEMPLATE
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    with torch.device("cpu"):
        model = Qwen3ForCausalLM(
            Qwen3Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=1, **small)
        )
    took: dict[str, float] = {}

    class Measured(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            clock = Clock()
            result = super()._prepare_dataset(*args, **kwargs)
            took.update(clock.stop())
            return result

    settings = SFTConfig(
        output_dir=str(work / "trl"),
        max_length=MAX_LENGTH,
        assistant_only_loss=True,
        dataset_num_proc=None if num_proc == 1 else num_proc,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    clock = Clock()
    raw = load_dataset("json", data_files=str(path), split="train")
    reading = clock.stop()
    trainer = Measured(model, settings, train_dataset=raw, processing_class=tokenizer)
    times = {name: reading[name] + took[name] for name in took}
    return times | {"json_seconds": reading["seconds"]} | counts_of_dataset(trainer.train_dataset)


WAYS: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {
    function.__name__: function for function in (limit, limit_fast, ours, cached, seed, trl)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--num_proc", type=int, default=1)
    args = parser.parse_args()
    # threads for the bare tokenizer; processes for all others
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.way.startswith("limit") and args.num_proc > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(args.num_proc)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir=args.work) as nothing_cached:
        os.environ["HF_DATASETS_CACHE"] = nothing_cached
        result = WAYS[args.way](args.work, args.work / f"{args.corpus}.jsonl", args.num_proc)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
