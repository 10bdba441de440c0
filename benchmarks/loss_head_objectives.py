"""What each objective costs over DFT in the fused head: time and memory of the loss with its gradients.

    python benchmarks/loss_head_objectives.py            # writes results/loss_head_objectives_cpu.md and .json
    python benchmarks/loss_head_objectives.py --quick    # one small case, a few rounds, writes nothing
    python benchmarks/loss_head_objectives.py --device cuda

All objectives take turns in one process. Each is compared with the DFT of its own round, because machines change their
speed by more than an objective costs; the median of these ratios counts. The last line is JSON.
"""

import argparse
import gc
import json
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.timing import seconds_of
from benchmarks.loss_head import Case
from benchmarks.loss_head_ops import forget_peak, peak_bytes
from benchmarks.measuring import facts, keep, markdown_table, surroundings
from dft.config.loss import CHUNK_MB, LossConfig
from dft.config.objectives import OBJECTIVES
from dft.loss.from_logits import TokenData
from dft.loss.fused import fused_dft_loss_sum
from dft.loss.objectives import make_objective
from dft.loss.token_weight import TokenWeight

CASES = {
    "cpu": (Case(2048, 32000, 256, 1.0, 1.0), Case(512, 32000, 1024, 1.0, 1.0), Case(64, 151936, 1024, 1.0, 1.0)),
    "cuda": (Case(8192, 151936, 4096, 1.0, 1.0), Case(8192, 128256, 2048, 1.0, 1.0)),
}
OF_REFERENCE = [name for name, about in OBJECTIVES.items() if about.needs_reference]
NEEDS = {"eaft": "top 20", "deft": "Σp²", "idft": "entropy"} | dict.fromkeys(OF_REFERENCE, "p_ref")


class Problem:
    """Hidden states, head and labels of a case; every second token is likely, as in a model that knows something."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        hidden = torch.randn(1, case.tokens, case.hidden, device=device)
        head = 2 * torch.randn(case.vocabulary, case.hidden, device=device) / case.hidden**0.5
        self.labels = torch.randint(case.vocabulary, (1, case.tokens), device=device)
        hidden[0, :-1:2] += 8 * torch.nn.functional.normalize(head[self.labels[0, 1::2]], dim=-1)
        self.hidden, self.head = (x.to(dtype).requires_grad_() for x in (hidden, head))
        self.data = TokenData(reference_log_p=-torch.rand(case.tokens - 1, device=device))
        self.chunk_mb = CHUNK_MB[device.type]

    def step(self, weight: TokenWeight) -> None:
        """Forward and backward."""
        self.hidden.grad = self.head.grad = None
        args = (self.hidden, self.head, self.labels, weight, self.data)
        fused_dft_loss_sum(*args, chunk_mb=self.chunk_mb)[0].backward()


def measure(case: Case, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Of each objective: seconds, and time and memory over DFT."""
    problem = Problem(case, device)
    weights = {name: TokenWeight(objective=make_objective(LossConfig(objective=name))) for name in OBJECTIVES}
    seconds: dict[str, list[float]] = {name: [] for name in weights}
    memory: dict[str, list[float]] = {name: [] for name in weights}
    for number in range(rounds + 1):
        for name, weight in weights.items():
            problem.hidden.grad = problem.head.grad = None
            gc.collect()
            forget_peak(device)
            before = peak_bytes(device)
            (taken,) = seconds_of(lambda weight=weight: problem.step(weight), times=1, warm=0)
            if number > 0:  # the first round makes room, and compiles
                seconds[name].append(taken)
                memory[name].append(peak_bytes(device) - before)
        print(f"{case}: round {number} of {rounds}", flush=True)
    return {
        name: {
            "seconds": median(seconds[name]),
            "time_over_dft": median(a / b for a, b in zip(seconds[name], seconds["dft"], strict=True)),
            "memory_mb": median(memory[name]) / 1e6,
        }
        for name in weights
    }


def describe(found: dict[Case, dict[str, dict[str, float]]], about: dict[str, Any], rounds: int) -> str:
    parts = ["# What objectives cost: results", facts(about)]
    for case, results in found.items():
        lines: list[tuple[str, ...]] = [("", "needs", "seconds", "× DFT", "memory, MB")]
        for name, result in results.items():
            numbers = (f"{result['seconds']:.3f}", f"{result['time_over_dft']:.2f}", f"{result['memory_mb']:,.0f}")
            lines.append((name, NEEDS.get(name, "p"), *numbers))
        parts += [f"## {case}", markdown_table(lines)]
    parts.append(
        f"""\
- Forward and backward in the fused head, in the chunks that are its default; one thread on a processor.
- × DFT: the median of {rounds} rounds' ratios to DFT in the same round. sft, threshold, chord and talr do the same
  work as dft, so what they differ by is the noise of the measurement.
- Memory: the most above the inputs, which holds the gradients. p_ref is a number for each token that is given."""
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, a few rounds, no results written")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases, rounds = CASES[args.device], args.rounds
    if args.quick:
        cases, rounds = (cases[0]._replace(tokens=512),), 3
    found = {case: measure(case, torch.device(args.device), rounds) for case in cases}
    text = describe(found, surroundings(("torch", "triton")), rounds)
    print(text)
    numbers = {
        f"{name}_v{case.vocabulary}_h{case.hidden}_time_over_dft": round(result["time_over_dft"], 3)
        for case, results in found.items()
        for name, result in results.items()
    }
    if not args.quick:
        rows = [case._asdict() | {"objective": name} | r for case, rs in found.items() for name, r in rs.items()]
        keep(f"loss_head_objectives_{args.device}", text, surroundings(("torch", "triton")) | {"found": rows})
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
