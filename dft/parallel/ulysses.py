"""Sequence parallelism: the processes of a group compute one batch together, each of them a part of its tokens.

All layers work on single tokens, but for attention. There each process gets all tokens of a part of the heads, and
gives the results back: DeepSpeed-Ulysses, arXiv 2309.14509. To DDP, ZeRO and FSDP the parts are micro-batches like
any others, so the loss is scaled as without sequence parallelism.

A batch is one row of documents without padding. Attention implementations that find documents by cu_seq_lens
(varlen, FlashAttention) get those of the whole row.

Shapes: S tokens of a batch, P processes of a group, C = ceil(S / P) tokens of a part, E dimensions of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dft.batching.collators import FlatteningCollator
from dft.batching.varlen_attention import VARLEN
from dft.config.loss import Normalization
from dft.constants import IGNORE_INDEX
from dft.errors import UserError
from dft.loss.batch import Batch
from dft.loss.from_logits import TokenData, count_terms
from dft.loss.statistics import TokenStatistics

# what a batch may hold for the model; of anything else it isn't known how to take a part
KNOWN_INPUTS = {
    *("input_ids", "attention_mask", "position_ids", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


class SequenceGroup:
    """The processes that compute a batch together: `size` ranks that follow each other.

    Every rank makes one, at the same time.

    Args:
        size: P, which divides the number of processes.
        config: of the model, which was loaded with its attention implementation.

    Raises:
        UserError: the heads can't be divided by P, or the attention implementation doesn't find documents.
    """

    def __init__(self, size: int, config: PretrainedConfig):
        name = config.get_text_config()._attn_implementation
        check_attention(size, config, name)
        self.size = size
        self.group, _ = dist.new_subgroups(size)
        self.rank = dist.get_rank(self.group)
        self.num_attended = 0  # calls of attention, to see that the model passes its arguments on
        core = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(core, AttentionOverHeads):
            AttentionInterface.register(name, AttentionOverHeads(core))

    def part_of(self, batch: Batch) -> "Part":
        """This rank's part of a batch, which all ranks of the group have; see `take_part`."""
        part = take_part(batch, self.rank, self.size)
        part.inputs["sequence_group"] = self
        return part

    def check_attended(self) -> None:
        """After a call of the model.

        Raises:
            UserError: its attention was not called with what the model was called with.
        """
        if self.num_attended == 0:
            raise UserError(
                "--sequence_parallel_size: this model doesn't pass its arguments on to attention, so that a token "
                "would see those of its own process alone; drop the flag"
            )


def check_attention(size: int, config: PretrainedConfig, attention: str) -> None:
    """Raises UserError where a model's attention can't be divided over `size` processes.

    Args:
        attention: the attention implementation.
    """
    if size == 1:
        return
    num_heads = config.get_text_config().num_attention_heads
    if num_heads % size:
        raise UserError(
            f"--sequence_parallel_size {size} doesn't divide the {num_heads} attention heads of the model, which are "
            "divided over the processes"
        )
    if attention != VARLEN and "flash" not in attention:
        raise UserError(
            f"--sequence_parallel_size {size} needs an attention implementation that finds documents in a row, which "
            f"{attention} doesn't: varlen, or a FlashAttention"
        )


def without_padding(batch: Batch) -> Batch:
    """A batch as one row [1, S] of documents, as FlatteningCollator makes them.

    Raises:
        ValueError: it holds inputs of the model that aren't known.
    """
    inputs = batch.inputs
    if unknown := sorted(inputs.keys() - KNOWN_INPUTS):
        raise ValueError(f"sequence parallelism doesn't know how to divide {', '.join(unknown)} of a batch")
    if "cu_seq_lens_q" in inputs:
        return batch
    mask, labels = inputs.get("attention_mask"), batch.labels
    is_token = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    lengths = batch.lengths.tolist()
    columns = {"input_ids": inputs["input_ids"], "labels": labels, "loss_weights": batch.loss_weights}
    columns = {name: values[is_token].split(lengths) for name, values in columns.items() if values is not None}
    rows = [dict(zip(columns, of_row, strict=True)) for of_row in zip(*columns.values(), strict=True)]
    flat = FlatteningCollator()(rows)
    flat = Batch.of({name: x.to(labels.device) if isinstance(x, Tensor) else x for name, x in flat.items()})
    reference_log_p = None if batch.reference_log_p is None else batch.reference_log_p[is_token][None]
    return replace(flat, reference_log_p=reference_log_p, channel=batch.channel)


@dataclass(frozen=True)
class Part(Batch):
    """A rank's part of a batch: C positions, and the labels of the tokens that they predict, [1, C + 1].

    What is counted once for a batch is that of the first part alone, and 0 for the others.

    Attributes:
        whole: the batch, in one row.
        start: of the part, in the row.
    """

    whole: Batch
    start: int

    @property
    def lengths(self) -> Tensor:
        lengths = self.whole.lengths
        return lengths if self.start == 0 else lengths[:0]

    def count_terms(self, normalization: Normalization) -> Tensor:
        num_terms = self.whole.count_terms(normalization)
        return num_terms if self.start == 0 else torch.zeros_like(num_terms)

    def token_data(self, normalization: Normalization) -> TokenData:
        """The batch's, for the N supervised tokens that this part predicts, each [N] or None."""
        data = self.whole.token_data(normalization)
        if data.loss_weight is None and data.reference_log_p is None:
            return data
        first = int(count_terms(self.whole.labels[:, : self.start + 1]))  # waits for the device
        return data[first : first + int(count_terms(self.labels))]

    def document_of(self, tokens: TokenStatistics) -> Tensor:
        return self.whole.document_of(self._in_whole(tokens))

    def channel_of(self, tokens: TokenStatistics) -> Tensor | None:
        return self.whole.channel_of(self._in_whole(tokens))

    def _in_whole(self, tokens: TokenStatistics) -> TokenStatistics:
        return replace(tokens, places=tokens.places + self.start)


def take_part(batch: Batch, rank: int, size: int) -> Part:
    """The part of a batch that the process `rank` of `size` computes.

    Raises:
        ValueError: the batch holds inputs of the model that aren't known.
    """
    whole = without_padding(batch)
    inputs, num_tokens = whole.inputs, whole.num_positions
    length = -(-num_tokens // size)
    added = length * size - num_tokens  # tokens at the end, which are a document
    boundaries, longest = inputs["cu_seq_lens_q"], inputs["max_length_q"]
    if added:
        boundaries, longest = pad(boundaries, (0, 1), value=length * size), max(longest, added)
    start, stop = rank * length, (rank + 1) * length
    positions = torch.cat([inputs["position_ids"], torch.arange(added, device=boundaries.device)[None]], dim=1)
    of_part = {
        "input_ids": pad(inputs["input_ids"], (0, added))[:, start:stop],
        "position_ids": positions[:, start:stop],
        **{"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries},
        **{"max_length_q": longest, "max_length_k": longest},
        "use_cache": False,
    }
    labels = pad(whole.labels, (0, added + 1), value=IGNORE_INDEX)[:, start : stop + 1]
    return Part(of_part, labels, None, None, None, whole, start)


@dataclass(frozen=True)
class AttentionOverHeads:
    """An attention function for calls of the model with `sequence_group`; all others are the original's.

    Attributes:
        core: the original, with the interface of transformers.
    """

    core: Callable[..., tuple[Tensor, Any]]

    @torch.compiler.disable
    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        sequence_group: SequenceGroup | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query, key and value: [1, heads, C, E] of this rank's tokens. Returns [1, C, heads, E]."""
        if sequence_group is None:
            return self.core(module, query, key, value, attention_mask, *args, **kwargs)
        if kwargs.get("s_aux") is not None:
            raise UserError("--sequence_parallel_size: attention with sinks isn't divided over processes; drop it")
        sequence_group.num_attended += 1
        size, group = sequence_group.size, sequence_group.group
        repeats = key_repeats(query.shape[1], key.shape[1], size)
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        query, key, value = (all_tokens(x, size, group) for x in (query, key, value))
        # a mask would be that of this rank's tokens; what it says is in cu_seq_lens, too
        out, _ = self.core(module, query, key, value, None, *args, **(kwargs | {"position_ids": None}))
        return all_heads(out, size, group), None


def key_repeats(num_heads: int, num_key_heads: int, size: int) -> int:
    """How often each key head is repeated, so that each of `size` processes gets those that its query heads use."""
    queries_of_key = num_heads // num_key_heads
    possible = (n for n in range(1, queries_of_key + 1) if queries_of_key % n == 0 and num_key_heads * n % size == 0)
    return next(possible)


def all_tokens(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """From all heads of a part's tokens to a part of the heads of all tokens.

    [1, heads, C, E] -> [1, heads / P, P·C, E].
    """
    _, heads, length, dim = x.shape
    x = _Exchange.apply(x.reshape(size, heads // size, length, dim), group)
    return x.transpose(0, 1).reshape(1, heads // size, size * length, dim)


def all_heads(x: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """Back from a part of the heads of all tokens: [1, P·C, heads / P, E] -> [1, C, heads, E]."""
    _, num_tokens, heads, dim = x.shape
    x = _Exchange.apply(x.reshape(size, num_tokens // size, heads, dim), group)
    return x.transpose(0, 1).reshape(1, num_tokens // size, size * heads, dim)


class _Exchange(torch.autograd.Function):
    """Gives x[i], [P, ...], to process i and gets one from each; the gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received
