"""A training step of real shapes with random weights: this project beside TRL, on the same rows and attention."""

from typing import Any

from benchmarks.gpu.part import NO_CUDA, Part, has_cuda, numbers, reason_of, results_of, run

WORKER = "benchmarks.gpu.step_way"
WAYS = {
    "ours_packed": "ours, packed",
    "trl_packed": "TRL, packed (bfd)",
    "ours_packed-liger": "ours, packed, Liger's layers",
    "trl_packed-liger": "TRL, packed (bfd), Liger's layers",
    "ours_padding_free": "ours, padding-free",
    "trl_padding_free": "TRL, padding-free",
    "ours_packed-compiled": "ours, packed, torch.compile",
    "trl_packed-compiled": "TRL, packed (bfd), torch.compile",
}
OPTIONS = ("liger", "compiled")
SIZES = ("0.6b", "1.7b")
HEADLINE = ("tokens_per_second", "mfu", "vs_trl", "liger_vs_not", "liger_vs_trl")
ITEM_SECONDS = 100.0  # importing and compiling included


def items(sizes: tuple[str, ...]) -> list[str]:
    """All measurements, the most telling ones first; compiling takes long."""
    found = [f"{size}/{way}" for size in sizes for way in WAYS]
    return sorted(found, key=lambda item: item.endswith("-compiled"))


def processes(items: list[str]) -> list[list[str]]:
    """The same in groups that share a worker process; one with an option doesn't: Liger changes a model's code."""
    groups: list[list[str]] = []
    for item in items:
        if groups and "-" not in item + groups[-1][-1]:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def compared(found: dict[str, Any], size: str) -> dict[str, Any]:
    """What one size says: the best of ours beside TRL's best with the same options, and what the options gain."""
    speed = {way: numbers(found.get(f"{size}/{way}")).get("tokens_per_second") for way in WAYS}
    ours = [way for way in ("ours_packed", "ours_padding_free") if speed[way]]
    theirs = [way for way in ("trl_packed", "trl_padding_free") if speed[way]]
    if not ours:
        return {}
    best = max(ours, key=lambda way: speed[way])
    result = {"best": best, "tokens_per_second": speed[best], "mfu": found[f"{size}/{best}"]["mfu"]}
    if theirs:
        result["vs_trl"] = speed[best] / max(speed[way] for way in theirs)
    else:
        result["vs_trl"] = reason_of(found.get(f"{size}/trl_packed"))
    for option in OPTIONS:
        mine, other = f"ours_packed-{option}", f"trl_packed-{option}"
        if speed["ours_packed"] and speed[mine]:
            result[f"{option}_vs_not"] = speed[mine] / speed["ours_packed"]
        if speed[mine] and speed[other]:
            result[f"{option}_vs_trl"] = speed[mine] / speed[other]
    return result


def measure(part: Part) -> None:
    sizes = ("tiny",) if part.tiny else SIZES
    item_seconds = part.seconds if part.tiny else ITEM_SECONDS
    for process in processes(items(sizes)):
        if "-" in process[0] and not has_cuda():
            part.add(process[0], NO_CUDA)
            continue
        for item, result in results_of(part, WORKER, process, item_seconds):
            part.add(item, result)
            part.result["sizes"] = {size: compared(part.measurements, size) for size in sizes}
            told = part.result["sizes"][sizes[0]]
            part.headline(**{name: told[name] for name in HEADLINE if name in told})
    for item, result in part.measurements.items():
        if "/ours" in item and reason_of(result).startswith("failed"):
            raise RuntimeError(f"{item}: {result}")


if __name__ == "__main__":
    run("step", measure)
