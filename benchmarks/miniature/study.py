"""The runs of the study: which objectives on which data, at which learning rates, with which seeds.

Base models come first. Then every objective is trained at every learning rate with seeds of their own, and examined
with validation problems. As one would in earnest, the task comes first: of the rates whose target is within a point
of the best, the one that keeps most of the other skills is that of the final runs. Every run is one line of
runs.jsonl, and what is there isn't run again.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from benchmarks.miniature.tasks import DATA, PRIORS, base_rows, exam, tuning_rows
from benchmarks.miniature.training import examine, make_model, train
from dft.config.loss import LossConfig

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dft 0.3": {"dft_alpha": 0.3},
    "dft 0.5": {"dft_alpha": 0.5},
    "dft 0.7": {"dft_alpha": 0.7},
    "dft 1": {},
    "gamma 0.5": {"dft_gamma": 0.5},
    "gamma 2": {"dft_gamma": 2.0},
    "floor 0.1": {"dft_floor": 0.1},
    "warm-up 0.5": {"dft_alpha_warmup_ratio": 0.5},
    "eaft": {"objective": "eaft"},
    "deft": {"objective": "deft"},
    "threshold": {"objective": "threshold"},
    "anchored": {"objective": "anchored"},
    "prior": {"objective": "prior"},
}
ALPHAS = ("sft", "dft 0.3", "dft 0.5", "dft 0.7", "dft 1")  # trained in every cell
CELLS = (
    *(("knows", data) for data in DATA),
    *(("half", data) for data in ("clean", "wrong 30%")),
    ("unknown", "clean"),
)
CELLS_OF_ALL = (("knows", "wrong 30%"), ("half", "wrong 30%"), ("knows", "new format"), ("unknown", "clean"))
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BATCH = 32  # rows of a step
TIE = 0.01  # of the target's accuracy


@dataclass(frozen=True)
class Size:
    """How much is run; the seeds of tuning and of the final runs have no base model in common."""

    base_rows: int
    base_steps: int
    rows: int
    steps: int
    problems: int
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[tuple[str, str], ...]
    cells_of_all: tuple[tuple[str, str], ...]


FULL = Size(60_000, 4000, 2000, 200, 500, RATES, (100, 101), (0, 1, 2, 3, 4), CELLS, CELLS_OF_ALL)
QUICK = Size(8_000, 250, 500, 30, 100, (3e-4, 1e-3), (100,), (0, 1), CELLS[2:3], ())


@dataclass(frozen=True)
class Job:
    """One fine-tuning. With the objective "base" the base model itself is examined."""

    prior: str
    data: str
    objective: str
    rate: float
    seed: int
    split: str  # of the problems that it is examined with


def base_path(directory: Path, prior: str, seed: int) -> Path:
    return directory / "bases" / f"{prior}-{seed}"


def make_base(size: Size, directory: Path, base: tuple[str, int]) -> None:
    """Trains the base model of a prior and a seed by plain cross-entropy, and saves it."""
    prior, seed = base
    torch.set_num_threads(1)
    model = make_model(seed)
    rows = base_rows(prior, size.base_rows, seed)
    train(model, rows, LossConfig(objective="sft"), 6e-3, size.base_steps, BATCH, seed)
    model.save_pretrained(base_path(directory, *base))


def run(size: Size, directory: Path, job: Job) -> dict[str, Any]:
    """What a job is, and what its model is like after it."""
    torch.set_num_threads(1)
    start = monotonic()
    model = Qwen3ForCausalLM.from_pretrained(base_path(directory, job.prior, job.seed))
    if job.objective != "base":
        rows = tuning_rows(job.data, size.rows, job.seed)
        train(model, rows, LossConfig(**OBJECTIVES[job.objective]), job.rate, size.steps, BATCH, job.seed)
    found = examine(model, exam(job.data, job.split, size.problems))
    return asdict(job) | found | {"seconds": round(monotonic() - start, 2)}


def objectives_of(size: Size, cell: tuple[str, str]) -> tuple[str, ...]:
    return tuple(OBJECTIVES) if cell in size.cells_of_all else ALPHAS


def best_rates(size: Size, records: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """The learning rate of each (prior, data, objective), by the means over the tuning seeds."""
    found: dict[tuple[str, str, str], dict[float, list[tuple[float, float]]]] = {}
    for record in records:
        if record["split"] == "validation" and record["seed"] in size.tuning_seeds:
            of_rates = found.setdefault((record["prior"], record["data"], record["objective"]), {})
            of_rates.setdefault(record["rate"], []).append((record["target"], record["kept"]))
    return {key: _best_rate(of_rates) for key, of_rates in found.items()}


def _best_rate(of_rates: dict[float, list[tuple[float, float]]]) -> float:
    """The rate that keeps most among those with the best target.

    Args:
        of_rates: for every rate the target and kept skills of every seed.
    """
    means = {rate: np.mean(runs, axis=0) for rate, runs in of_rates.items()}
    best = max(target for target, _ in means.values())
    good = {rate: kept for rate, (target, kept) in means.items() if target >= best - TIE}
    return max(sorted(good), key=good.__getitem__)


def run_study(size: Size, directory: Path, workers: int) -> list[dict[str, Any]]:
    """Runs what is missing in a directory, and returns the records of all runs."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    priors = [prior for prior in PRIORS if any(prior == cell[0] for cell in size.cells)]
    bases = [(prior, seed) for prior in priors for seed in (*size.tuning_seeds, *size.seeds)]
    bases = [base for base in bases if not base_path(directory, *base).exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        _each(pool, "base models", partial(make_base, size, directory), bases, lambda _: None)

        def finish(name: str, jobs: list[Job]) -> None:
            done = {tuple(record[field] for field in asdict(jobs[0])) for record in records}
            missing = [job for job in jobs if tuple(asdict(job).values()) not in done]
            with path.open("a", encoding="utf-8") as file:

                def keep(record: dict[str, Any]) -> None:
                    records.append(record)
                    file.write(json.dumps(record) + "\n")
                    file.flush()

                _each(pool, name, partial(run, size, directory), missing, keep)

        finish("bases", [Job(*cell, "base", 0.0, seed, "test") for cell in size.cells for seed in size.seeds])
        tuned = [(*cell, name) for cell in size.cells for name in objectives_of(size, cell)]
        tries = [(rate, seed) for rate in size.rates for seed in size.tuning_seeds]
        finish("learning rates", [Job(*key, *one, "validation") for key in tuned for one in tries])
        rates = best_rates(size, records)
        finish("final runs", [Job(*key, rates[key], seed, "test") for key in tuned for seed in size.seeds])
    return records


def _each(
    pool: ProcessPoolExecutor, name: str, work: Callable[[Any], Any], items: list[Any], then: Callable[[Any], None]
) -> None:
    """Has every item worked on, and says how far it is."""
    start = monotonic()
    for count, future in enumerate(as_completed([pool.submit(work, item) for item in items]), start=1):
        then(future.result())
        if count % 20 == 0 or count == len(items):
            left = (monotonic() - start) / count * (len(items) - count) / 60
            print(f"{name}: {count} of {len(items)}, {left:.0f} minutes left", flush=True)
