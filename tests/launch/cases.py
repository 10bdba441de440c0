"""The cases of test_invariance.py: one optimizer step over the same 8 rows, trained in different ways."""

from dataclasses import dataclass
from typing import Literal

from dft.config.loss import Normalization

Engine = Literal["one process", "ddp", "zero2", "zero3", "accelerate", "zero3 on four", "fsdp"]
Head = Literal["tied", "untied", "lora", "frozen", "4 bits"]
Batching = Literal["padded", "padding_free", "packed"]

ENGINES: tuple[Engine, ...] = ("ddp", "zero2", "zero3", "accelerate", "fsdp")  # on two processes
HEADS: tuple[Head, ...] = ("untied", "lora", "frozen", "4 bits")


@dataclass(frozen=True)
class Case:
    """How one optimizer step is trained.

    Attributes:
        engine: what the processes are joined by; "accelerate" is ZeRO-3 as accelerate configures it. They are two, but
            for "one process" and "zero3 on four".
        rows: of a micro-batch on each process; where batches are packed, these are packed rows.
        micro_batches: of a step, on each process.
        head: "lora" has an adapter on it, "frozen" is untied and not trained; with "4 bits" all other layers have
            adapters on weights in 4 bits.
        objective: idft needs entropies, prior log-probabilities by the starting weights.
        sequence: processes that compute a micro-batch together, a part of its tokens each.
        normalization: of the loss.
        is_fused: the loss is computed in the head, not from logits.
        is_offloaded: weights (of ZeRO-3) and optimizer are kept in the memory of the processor.
        is_static_graph: DDP takes all steps to have the same graph.
        is_normalized_alone: a mutant, which averages the means of the micro-batches.
        is_evaluated_first: Trainer.evaluate is called before Trainer.train.
        on_nonfinite: the gradient of the second process alone is made infinite, and this is to happen then.
    """

    engine: Engine
    rows: int
    micro_batches: int = 1
    head: Head = "tied"
    batching: Batching = "padded"
    objective: str = "dft"
    sequence: int = 1
    normalization: Normalization = "token"
    is_fused: bool = True
    is_offloaded: bool = False
    is_static_graph: bool = False
    is_normalized_alone: bool = False
    is_evaluated_first: bool = False
    on_nonfinite: Literal["stop", "skip"] | None = None


CASES: dict[str, Case] = {
    "whole batch": Case("one process", rows=8),
    "whole batch from logits": Case("one process", rows=8, is_fused=False),
    "row by row": Case("one process", rows=1, micro_batches=8),
    **{f"whole batch, {head} head": Case("one process", rows=8, head=head) for head in HEADS},
    **{f"{engine}, half a batch": Case(engine, rows=4) for engine in ENGINES},
    **{f"{engine}, row by row": Case(engine, rows=1, micro_batches=4) for engine in ENGINES},
    **{
        f"{engine}, {head} head": Case(engine, rows=1, micro_batches=4, head=head)
        for engine in ("ddp", "zero2", "zero3", "fsdp")
        for head in HEADS
    },
    "ddp, padding-free": Case("ddp", rows=2, micro_batches=2, batching="padding_free"),
    "zero2, padding-free": Case("zero2", rows=4, batching="padding_free"),
    "zero3, packed": Case("zero3", rows=2, batching="packed"),
    **{
        f"whole batch, {objective}": Case("one process", rows=8, objective=objective)
        for objective in ("idft", "prior")
    },
    "whole batch, prior, from logits": Case("one process", rows=8, objective="prior", is_fused=False),
    "row by row, prior": Case("one process", rows=1, micro_batches=8, objective="prior"),
    "fsdp, packed": Case("fsdp", rows=2, batching="packed"),
    "fsdp, prior": Case("fsdp", rows=2, batching="packed", objective="prior"),
    "ddp, idft": Case("ddp", rows=1, micro_batches=4, objective="idft"),
    "zero2, idft": Case("zero2", rows=4, batching="padding_free", objective="idft"),
    "zero3, idft": Case("zero3", rows=2, batching="packed", objective="idft"),
    "ddp, prior": Case("ddp", rows=2, micro_batches=2, batching="padding_free", objective="prior"),
    "ddp, lora head, prior": Case("ddp", rows=1, micro_batches=4, head="lora", objective="prior"),
    "zero2, prior": Case("zero2", rows=1, micro_batches=4, objective="prior"),
    "zero3, prior": Case("zero3", rows=2, batching="packed", objective="prior"),
    "zero3, prior, row by row": Case("zero3", rows=1, micro_batches=4, objective="prior"),
    "whole batch, turn": Case("one process", rows=8, normalization="turn"),
    "ddp, sequence": Case("ddp", rows=2, micro_batches=4, sequence=2),
    "zero2, sequence": Case("zero2", rows=8, sequence=2, batching="padding_free"),
    "zero3, sequence": Case("zero3", rows=3, sequence=2, batching="packed"),
    "ddp, sequence, turn": Case("ddp", rows=8, sequence=2, batching="padding_free", normalization="turn"),
    "zero3, sequence, prior": Case("zero3", rows=1, micro_batches=8, sequence=2, objective="prior"),
    "ddp, sequence, idft": Case("ddp", rows=8, sequence=2, is_fused=False, objective="idft"),
    "zero3, lora head, sequence": Case("zero3", rows=2, micro_batches=4, head="lora", sequence=2),
    "zero3 on four, sequence": Case("zero3 on four", rows=2, micro_batches=2, sequence=2, normalization="turn"),
    "zero3 on four, one sequence": Case("zero3 on four", rows=8, sequence=4),
    "zero2, offloaded": Case("zero2", rows=1, micro_batches=4, is_offloaded=True),
    "zero3, offloaded": Case("zero3", rows=1, micro_batches=4, is_offloaded=True),
    "ddp, static graph": Case("ddp", rows=4, is_static_graph=True),
    "mutant, half a batch": Case("ddp", rows=4, is_normalized_alone=True),
    "mutant, row by row": Case("ddp", rows=1, micro_batches=4, is_normalized_alone=True),
    "evaluated first": Case("ddp", rows=4, is_evaluated_first=True),
    "fsdp, evaluated first": Case("fsdp", rows=4, is_evaluated_first=True),
    **{
        f"{engine}, {what}": Case(engine, rows=2, micro_batches=2, on_nonfinite=what)
        for engine in ("ddp", "zero2", "zero3", "fsdp")
        for what in ("stop", "skip")
    },
    "zero3, offloaded, skip": Case("zero3", rows=2, micro_batches=2, on_nonfinite="skip", is_offloaded=True),
}
