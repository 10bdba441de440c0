"""The memory of a GPU in training, estimated from the sizes of a model and counted activations.

The parts of a training step are not all held at once. An estimate is the greatest of its moments: the loss head at
the end of the forward pass, its backward pass, the layers' backward pass, and the update. scripts/estimate_memory.py
prints it for many settings, and benchmarks/memory_estimate.py compares it with measured peaks.

Letters: V vocabulary, H hidden size, T tokens of a micro-batch on one GPU, N supervised ones among them.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dft.config.command_line import Settings
from dft.config.loss import CHUNK_MB, CHUNKS_OF_GROUP
from dft.errors import UserError
from dft.model.activations import Activations, Computation, count_activations

logger = logging.getLogger(__name__)

GIB = 2**30
CONTEXT = 1.0 * GIB  # what CUDA, NCCL and cuBLAS take before there is a tensor
FRAGMENTATION = 0.05  # of all tensors: holes that PyTorch's allocator can't use
NF4_BYTES = 0.5 + 4 / 64  # of a weight: 4 bits, and a float32 scale for each block of 64 (arXiv 2305.14314)
SUB_GROUP = 10**9  # parameters that ZeRO-3 updates at once, DeepSpeed's default of sub_group_size


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters.

    Args:
        trained, frozen: with and without gradients; tied weights count once.
        quantized: of the frozen ones, those kept in 4 bits.
        largest: of one tensor, which ZeRO-3 gathers as a whole.
        vocab, hidden: V and H; the head is [V, H].
        trains_head, is_tied: whether the head has a gradient, and whether it is the embedding too.
    """

    trained: int
    frozen: int
    quantized: int
    largest: int
    vocab: int
    hidden: int
    trains_head: bool
    is_tied: bool

    @property
    def head(self) -> int:
        return self.vocab * self.hidden


def model_sizes(model: PreTrainedModel, quantizes: bool = False) -> ModelSizes:
    """The sizes of a model, which may be on the meta device, or sharded by ZeRO-3.

    Args:
        quantizes: count the frozen weights of linear layers as kept in 4 bits, but for the head.
    """
    sizes = {id(p): (p, _full_shape(p).numel()) for p in model.parameters()}
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    quantized = {id(w): _full_shape(w).numel() for w in linear if quantizes and not w.requires_grad}
    vocab, hidden = _full_shape(head.weight)
    return ModelSizes(
        trained=sum(size for p, size in sizes.values() if p.requires_grad),
        frozen=sum(size for p, size in sizes.values() if not p.requires_grad),
        quantized=sum(quantized.values()),
        largest=max(size for _, size in sizes.values()),
        vocab=vocab,
        hidden=hidden,
        trains_head=head.weight.requires_grad,
        is_tied=head.weight is model.get_input_embeddings().weight,
    )


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a weight; ZeRO-3 empties the weight itself and keeps its shape beside it."""
    return getattr(parameter, "ds_shape", parameter.shape)


# ---- settings -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Bytes of a trained parameter's weight, gradient and optimizer state, of a frozen one, and of a product's inputs.

    Args:
        optimizer: the two moments of AdamW, and under DeepSpeed its float32 copy of the weight.
    """

    weight: int
    gradient: int
    optimizer: int
    frozen: int
    computed: int


def plain_precision(dtype: torch.dtype, bf16: bool, has_adapters: bool) -> Precision:
    """Without DeepSpeed: gradients and moments have the type of the weights; peft keeps adapters in float32."""
    size = dtype.itemsize
    trained = 4 if has_adapters else size
    return Precision(trained, trained, 2 * trained, size, 2 if bf16 or size == 2 else 4)


def deepspeed_precision(bf16: bool) -> Precision:
    """Under DeepSpeed: 2 + 2 + 12 bytes in 16 bits (ZeRO, arXiv 1910.02054, section 3.1), else 4 + 4 + 12.

    In 32 bits too its optimizer updates a copy of the weights (stage_1_and_2.py, single_partition_of_fp32_groups).
    """
    size = 2 if bf16 else 4
    return Precision(size, size, 12, size, size)


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed's configuration says of memory.

    Args:
        stage: 0 for training without DeepSpeed.
        offload: what is kept in the memory of the host: none, optimizer, or all (weights too).
        reduce_bucket, max_live: numbers of elements.
        overlap: whether a second bucket is filled while the first is reduced.
    """

    stage: int = 0
    offload: str = "none"
    reduce_bucket: int = 0
    max_live: int = 0
    overlap: bool = False


def read_zero(config: dict[str, Any], hidden: int) -> Zero:
    """Reads a configuration of DeepSpeed; what it leaves out has DeepSpeed's defaults (runtime/zero/config.py).

    Args:
        hidden: H; transformers makes "auto" buckets of H² elements.
    """
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)

    def is_on_host(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") != "none"

    bucket = zero.get("reduce_bucket_size", 5e8)
    offload = "all" if is_on_host("offload_param") else "optimizer" if is_on_host("offload_optimizer") else "none"
    return Zero(
        stage,
        offload,
        hidden**2 if bucket == "auto" else int(bucket),
        int(zero.get("stage3_max_live_parameters", 1e9)),
        zero.get("overlap_comm", stage == 3),
    )


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one GPU.

    Args:
        tokens, supervised: T and N.
        chunk_mb: MB (10**6 bytes) of float32 logits at once, see --loss_chunk_mb.
        accumulates: whether gradients of earlier micro-batches are held while this one is computed.
    """

    tokens: int
    supervised: int
    chunk_mb: float = CHUNK_MB["cuda"]
    accumulates: bool = False


# ---- the estimate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU.

    Args:
        weights, gradients, optimizer, buckets: at their greatest; weights that ZeRO-3 has gathered are buckets.
        activations: kept for the backward pass, and what it works with.
        loss_head: the most of its forward and backward pass.
        total: the greatest sum at any one moment, which may be less than that of all parts.
        host: bytes of the host's memory for this GPU.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss_head: float
    buckets: float
    total: float
    host: float

    @property
    def needed(self) -> float:
        """What the card must have: the total, with room for fragmentation and CUDA itself."""
        return self.total * (1 + FRAGMENTATION) + CONTEXT

    def fits(self, card: float) -> bool:
        """Whether a card of so many bytes is enough."""
        return self.needed <= card


@dataclass(frozen=True)
class HeadBytes:
    """Memory of the fused loss head: in its forward pass, its backward pass, and of the head's gradient after it."""

    forward: float
    backward: float
    gradient: float


def loss_head_bytes(sizes: ModelSizes, batch: Batch, precision: Precision) -> HeadBytes:
    """What dft.loss.fused._fused allocates.

    The logits of one chunk are float32. In 32 bits their gradient takes their place; in 16 bits those of a group of
    chunks are held for one product. The gradient of the head is a float32 sum over groups, if there are several, else
    it is made in the backward pass from the only group.
    """
    stored, computed = precision.weight if sizes.trains_head else precision.frozen, precision.computed
    in_place = computed == 4
    rows = max(1, int(min(batch.chunk_mb * 1e6 / (4 * sizes.vocab), batch.supervised)))
    group = min(batch.supervised, rows * (CHUNKS_OF_GROUP if sizes.trains_head and not in_place else 1))
    logits = 4 * rows * sizes.vocab
    group_gradients = 0 if in_place else 2 * group * sizes.vocab
    has_groups = batch.supervised > group
    summed = 4 * sizes.head if sizes.trains_head and has_groups else 0
    cast = sizes.head * computed if stored != computed else 0
    rows_bytes = batch.supervised * sizes.hidden * (stored + 4)  # supervised hidden states, and their gradient
    of_group = group * sizes.hidden * (4 + (computed if stored != computed else 0))
    waiting = 0 if has_groups or not sizes.trains_head else logits if in_place else group_gradients
    gradient = sizes.head * stored if sizes.trains_head else 0
    made = gradient if waiting or stored != 4 else 0  # else the sum itself becomes the gradient
    return HeadBytes(
        forward=logits + group_gradients + summed + cast + rows_bytes + of_group,
        backward=rows_bytes + summed + waiting + made + batch.tokens * sizes.hidden * stored,
        gradient=gradient,
    )


def estimate(
    sizes: ModelSizes, activations: Activations, batch: Batch, precision: Precision, zero: Zero, gpus: int = 1
) -> Estimate:
    """The memory of one of `gpus` GPUs; see ZeRO, arXiv 1910.02054, section 5, and `_zero_buckets`."""
    stage, on_host = zero.stage, zero.offload != "none"
    states_shared, gradients_shared, weights_shared = (gpus if stage >= least else 1 for least in (1, 2, 3))
    frozen = (sizes.frozen - sizes.quantized) * precision.frozen + sizes.quantized * NF4_BYTES
    all_weights = sizes.trained * precision.weight + frozen
    weights = 0.0 if zero.offload == "all" else all_weights / weights_shared
    gradients = 0.0 if on_host else sizes.trained * precision.gradient / gradients_shared
    states = sizes.trained * precision.optimizer / states_shared
    optimizer = 0.0 if on_host else states
    always, in_backward, in_update = _zero_buckets(sizes, precision, zero, gpus, all_weights)
    head = loss_head_bytes(sizes, batch, precision)
    working = activations.working + (2 * sizes.largest if sizes.quantized else 0)  # a layer's weights in 16 bits

    base = weights + optimizer + always
    before = gradients if batch.accumulates or stage == 3 else 0.0  # ZeRO-3 makes room for them at the start
    embedding = sizes.head * precision.weight if sizes.is_tied and sizes.trains_head else 0  # added to the head's
    moments = (
        base + before + activations.kept + head.forward,
        base + before + in_backward + activations.kept + head.backward,
        base + before + in_backward + activations.kept + head.gradient + working,
        base + gradients + in_backward + max(working, embedding),
        base + gradients + in_update,
    )
    return Estimate(
        weights,
        gradients,
        optimizer,
        activations.kept + working,
        max(head.forward, head.backward),
        always + max(in_backward, in_update),
        max(moments),
        host=(states + sizes.trained * 4 / gradients_shared if on_host else 0.0)
        + (all_weights / weights_shared if zero.offload == "all" else 0.0),
    )


def _zero_buckets(
    sizes: ModelSizes, precision: Precision, zero: Zero, gpus: int, all_weights: float
) -> tuple[float, float, float]:
    """Buffers of DDP and of DeepSpeed 0.19, in bytes: those always there, of the backward pass, and of the update.

    DDP: flat buckets as large as all gradients.
    ZeRO-1 and 2 (stage_1_and_2.py): setup_buckets allocates reduce_bucket_size elements, whatever the model's size,
    and as many again with overlap_comm; the update has the gradients of its share once more, flat, and in float32.
    ZeRO-3 (stage3.py): its bucket is there from the start, and the reduction copies what is in it. Up to
    max_live_parameters weights are gathered, prefetched ones among them, and at least the largest tensor; one GPU
    gathers none but those it fetches from the host. The update has the float32 gradients of one sub-group.
    """
    gradient = sizes.trained * precision.gradient
    if zero.stage == 0:
        return (gradient if gpus > 1 else 0.0), 0.0, 0.0
    on_host = zero.offload != "none"
    bucket = zero.reduce_bucket * precision.gradient
    share = sizes.trained / gpus
    if zero.stage < 3:
        in_update = 0.0 if on_host else share * (precision.gradient + (4 if precision.gradient == 2 else 0))
        return 0.0, bucket * (2 if zero.overlap else 1), in_update
    count = sizes.trained + sizes.frozen
    gathers = gpus > 1 or zero.offload == "all"
    gathered = all_weights * min(1.0, max(zero.max_live, sizes.largest) / count) if gathers else 0.0
    in_update = 0.0 if on_host else 4 * min(share, SUB_GROUP)
    return bucket + gathered, min(bucket, gradient), in_update


# ---- at the start of a run ----------------------------------------------------------------------


def warn_if_too_large(model: PreTrainedModel, settings: Settings, longest: int) -> None:
    """Logs a warning where a run is estimated to need more memory than its GPU has; not without a GPU, nor under FSDP.

    Args:
        model: as it was loaded.
        longest: tokens of the longest training row.
    """
    args = settings.training
    if args.device.type != "cuda" or args.process_index != 0 or not args.do_train or args.fsdp:
        return
    card = torch.cuda.get_device_properties(args.device).total_memory
    message = too_large_message(model, settings, longest, card)
    if message is not None:
        logger.warning(message)


def too_large_message(model: PreTrainedModel, settings: Settings, longest: int, card: float) -> str | None:
    """What the warning says; None where the estimate is below the card's bytes, or none can be made.

    The greatest micro-batch is taken, with every token supervised.
    """
    args = settings.training
    recompute = bool(args.gradient_checkpointing or args.activation_checkpointing)
    adapters = getattr(model, "peft_config", None) or {}
    rank = max((config.r for config in adapters.values()), default=0)
    plugin = args.deepspeed_plugin
    dtype, is_16_bit = model.dtype, args.bf16 or args.fp16
    if plugin is None:
        precision, zero = plain_precision(dtype, is_16_bit, rank > 0), Zero()
    else:
        precision = deepspeed_precision(is_16_bit)
        dtype = torch.bfloat16 if is_16_bit else torch.float32
        zero = read_zero(plugin.hf_ds_config.config, model.config.get_text_config().hidden_size)
    rows, length = args.per_device_train_batch_size, longest
    if args.batching == "packed":
        length = settings.data.max_length
    if args.max_tokens_per_batch is not None:
        rows, length = 1, args.max_tokens_per_batch
    length = -(-length // args.sequence_parallel_size)
    tokens, chunk_mb = rows * length, settings.loss.loss_chunk_mb or CHUNK_MB["cuda"]
    batch = Batch(tokens, tokens, chunk_mb, args.gradient_accumulation_steps > 1)
    autocast = is_16_bit and plugin is None
    adapter_dtype = torch.float32 if plugin is None else dtype  # DeepSpeed makes all weights of one type
    try:
        activations = count_activations(
            model.config, Computation(rows, length, dtype, autocast, recompute, rank, adapter_dtype)
        )
        found = estimate(model_sizes(model), activations, batch, precision, zero, args.world_size)
    except UserError as error:
        logger.info("No estimate of the memory: %s", error)
        return None
    if found.fits(card):
        return None
    remedy = "--per_device_train_batch_size or --max_length lower" if recompute else "--activation_checkpointing True"
    return (
        f"This run may need {found.needed / GIB:.0f} GiB on a GPU of {card / GIB:.0f} GiB: if it runs out of memory, "
        f"try {remedy}, or what `python scripts/estimate_memory.py {settings.model.model_name_or_path}` recommends"
    )
