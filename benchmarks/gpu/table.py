"""The results of all parts as tables, and one line of JSON; the exit status is 1 if a part failed."""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import loss_head, step
from benchmarks.gpu.part import numbers, reason_of, write_json
from benchmarks.measuring import markdown_table

NUM_COSTS = 5  # of a step are shown
CUT = "failed: it was cut at its time limit or killed; what it had measured until then stays"


def result_of(out: Path, part: str) -> dict[str, Any]:
    """What a part has left, whose status is "failed" if it didn't end by itself."""
    path = out / f"{part}.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"failed: no result ({type(error).__name__}), see {part}.log"
        return {"part": part, "status": "failed", "reason": reason, "seconds": 0.0, "headline": {}, "measurements": {}}
    if result["status"] == "running":
        result |= {"status": "failed", "reason": CUT}
        write_json(path, result)
    return result


def shown(value: Any) -> str:
    """A number with three digits, or whole; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def summary(results: list[dict[str, Any]]) -> str:
    lines: list[tuple[str, ...]] = [("part", "status", "seconds", "numbers")]
    for result in results:
        told = ", ".join(f"{name} {shown(value)}" for name, value in result["headline"].items())
        about = "; ".join(text for text in (told, result["reason"]) if text).replace("|", "/")
        lines.append((result["part"], result["status"], f"{result['seconds']:.0f}", about))
    return markdown_table(lines)


def facts_lines(measurements: dict[str, Any]) -> str:
    """Machine, versions and ceilings, as a list."""
    lines = []
    for name, value in measurements.items():
        told = numbers(value)
        text = ", ".join(f"{key} {shown(inner)}" for key, inner in told.items()) if told else str(value)
        lines.append(f"- {name}: {text}")
    return "\n".join(lines)


def cells(measurement: Any, formats: dict[str, str]) -> tuple[str, ...]:
    """The numbers of a measurement; the reason in place of the first if there are none."""
    told = numbers(measurement)
    if not told:
        return (reason_of(measurement).replace("|", "/"), *("" for _ in list(formats)[1:]))
    values = [told.get(name, "") for name in formats]
    return tuple(
        form.format(value) if isinstance(value, int | float) else str(value)
        for form, value in zip(formats.values(), values, strict=True)
    )


def loss_head_tables(result: dict[str, Any]) -> str:
    """A table for each case, and what it says."""
    formats = {"milliseconds": "{:.2f}", "ratio": "{:.2f}", "memory_mb": "{:,.0f}", "error": "{:.1e}"}
    header = ("", "milliseconds", "× bare products", "memory, MB", "error")
    found = {loss_head.measured_of(item): value for item, value in result["measurements"].items()}
    parts = []
    for case in dict.fromkeys(case for _, case in found):
        limit = numbers(found.get(("products", case))).get("seconds")
        lines: list[tuple[str, ...]] = [header]
        for way, value in ((way, value) for (way, other), value in found.items() if other == case):
            told = dict(numbers(value))
            if told:
                told["milliseconds"] = told["seconds"] * 1e3
                told["ratio"] = told["seconds"] / limit if limit else ""
                told["error"] = max((told[name] for name in told if name.startswith("error_")), default="")
            name = loss_head.WAYS.get(way) or f"ours, {way.removeprefix('ours_')} MB of logits"
            lines.append((name, *cells(told or value, formats)))
        parts += [f"### {case}", markdown_table(lines)]
        says = result.get("cases", {}).get(str(case), {})
        parts += [", ".join(f"{name} {shown(value)}" for name, value in says.items())] if says else []
    return "\n\n".join(parts)


def step_tables(result: dict[str, Any]) -> str:
    """A table of all ways, and the largest costs of one step of each."""
    formats = {"tokens_per_second": "{:,.0f}", "mfu": "{:.1%}", "seconds_per_step": "{:.3f}", "memory_mib": "{:,.0f}"}
    formats |= {"grad_norm_min": "{:.1e}", "attention": "{}"}
    header = ("", "tokens/s", "MFU", "seconds a step", "memory, MiB", "least gradient norm", "attention")
    lines: list[tuple[str, ...]] = [header]
    costs = []
    for item, value in result["measurements"].items():
        size, _, way = item.partition("/")
        lines.append((f"{size}, {step.WAYS[way]}", *cells(value, formats)))
        if listed := numbers(value).get("costs"):
            told = "; ".join(f"`{c['name'][:120]}` {c['ms']:.1f} ms ({c['share']:.0%})" for c in listed[:NUM_COSTS])
            costs.append(f"- {size}, {step.WAYS[way]}: {told}")
    return "\n\n".join([markdown_table(lines), "The largest costs of one step:", "\n".join(costs)])


def describe(results: list[dict[str, Any]]) -> str:
    """All results, for people."""
    details = {
        "facts": lambda result: facts_lines(result["measurements"]),
        "correctness": lambda result: facts_lines(result["measurements"]),
        "loss_head": loss_head_tables,
        "step": step_tables,
        "memory": lambda result: facts_lines(result["measurements"]),
        "quickstart": lambda result: facts_lines(result["measurements"]),
    }
    parts = ["# A GPU run: results", summary(results)]
    for result in results:
        if result["measurements"]:
            parts += [f"## {result['part']}", details[result["part"]](result)]
    return "\n\n".join(parts)


def last_line(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of each part, or the reason why it has none; and the names of the parts that failed."""
    told: dict[str, Any] = {"failed": [result["part"] for result in results if result["status"] == "failed"]}
    for result in results:
        has_numbers = result["headline"] and result["status"] != "skipped"
        told[result["part"]] = result["headline"] if has_numbers else result["reason"]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", required=True)
    args = parser.parse_args()
    results = [result_of(args.out, part) for part in args.parts]
    (args.out / "results.md").write_text(describe(results) + "\n", encoding="utf-8")
    told = last_line(results)
    print(f"\n{summary(results)}\n\nDetails: {args.out / 'results.md'}")
    print(json.dumps(told))
    raise SystemExit(1 if told["failed"] else 0)


if __name__ == "__main__":
    main()
