"""The activations of a model, counted in a training step of fake tensors: sizes without numbers.

Each layer of a transformer keeps tensors for its backward pass, and which ones depends on how its norms, its attention
and its activation function are written. So they are counted and not derived: the model's own code runs with PyTorch's
FakeTensorMode, in which every operation gives tensors of the right shape and type without memory, and a dispatch mode
follows which of them are alive. Nothing is loaded and nothing is computed; it takes a second or two.

Attention is taken to be a kernel of the FlashAttention family, whose memory grows with the number of tokens and not
with its square.
"""

import copy
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import set_zero3_state

from dft.attention_kernel import kernel_groups_heads
from dft.errors import UserError

TRACED = "memory_trace"  # the name of the attention that stands in for a kernel
TRACED_LAYERS = (4, 8)  # a deeper model is extrapolated from these, between which its layers repeat
NOT_TRACEABLE = (AttributeError, RuntimeError, TypeError, ValueError)  # of model code that needs numbers


@dataclass(frozen=True)
class Activations:
    """What a micro-batch needs besides weights, gradients and the loss head, in bytes.

    Args:
        kept: alive when the last layer has been computed; freed from layer to layer in the backward pass.
        working: the most that the backward pass needs on top, such as one recomputed layer.
    """

    kept: int
    working: int


@dataclass(frozen=True)
class Computation:
    """How a micro-batch is computed.

    Args:
        rows, length: the micro-batch is [rows, length] tokens.
        dtype: of the weights.
        autocast: whether 32-bit weights are multiplied in bfloat16.
        recompute: whether layers are computed again in the backward pass (gradient checkpointing).
        lora_r: rank of the adapters on every linear layer but the head; 0 for none, and then all weights are trained.
        adapter_dtype: of the adapters; peft makes them float32, DeepSpeed of the weights' type.
    """

    rows: int
    length: int
    dtype: torch.dtype
    autocast: bool
    recompute: bool
    lora_r: int = 0
    adapter_dtype: torch.dtype = torch.float32


def count_activations(config: PretrainedConfig, computation: Computation) -> Activations:
    """The activations of a model of this configuration, which is left as it is, as is the state of random numbers.

    Raises:
        UserError: the model's code needs numbers, which fake tensors don't have.
    """
    layers = config.get_text_config().num_hidden_layers
    few, more = TRACED_LAYERS
    try:
        with torch.random.fork_rng(devices=[]):  # weights on the meta device are drawn too
            if layers <= more:
                return _trace(config, computation)
            first, second = (_trace(with_layers(config, number), computation) for number in TRACED_LAYERS)
    except NOT_TRACEABLE as error:
        raise UserError(f"the activations of a {config.model_type} model can't be counted: {error}") from error
    per_layer = (second.kept - first.kept) / (more - few)
    return Activations(round(second.kept + (layers - more) * per_layer), second.working)


def with_layers(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """A copy of a configuration with the first `number` layers, and of its lists that have an entry for each."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:number])
    text.num_hidden_layers = number
    return config


def build_model(
    config: PretrainedConfig, dtype: torch.dtype, lora_r: int = 0, adapter_dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model on the meta device, where weights have no memory; with adapters if they are asked for.

    The configuration is left as it is. Under ZeRO-3 nothing is sharded, so that one rank alone may call this.

    Raises:
        UserError: there is no such model class, or adapters are asked for and peft is not installed.
    """
    AttentionInterface.register(TRACED, _attention)
    AttentionMaskInterface.register(TRACED, lambda *args, **kwargs: None)
    try:
        with torch.device("meta"), set_zero3_state():  # or transformers would shard it over all ranks
            config = copy.deepcopy(config)  # transformers writes the type and the attention into it
            model = AutoModelForCausalLM.from_config(config, attn_implementation=TRACED, dtype=dtype)
    except (ImportError, ValueError) as error:
        raise UserError(f"no model can be made from this configuration: {error}") from error
    return _with_adapters(model, lora_r, adapter_dtype) if lora_r else model


def _to_fake(model: nn.Module) -> None:
    """Replaces weights and buffers on the meta device by fake ones on the processor, where autocast is defined."""
    fake: dict[int, Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                if id(tensor) not in fake:
                    fake[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake[id(tensor)] = nn.Parameter(fake[id(tensor)], tensor.requires_grad)
                group[name] = fake[id(tensor)]


def _with_adapters(model: PreTrainedModel, lora_r: int, dtype: torch.dtype) -> PreTrainedModel:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--method lora and qlora need the package peft: pip install peft") from error
    inject_adapter_in_model(LoraConfig(r=lora_r, target_modules="all-linear"), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the storages that operations inside this mode have made and that are still alive.

    Attributes:
        now: bytes alive.
        peak: the most so far; set it to `now` to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensor: Tensor) -> None:
        """Takes a tensor that was there before, such as a weight, out of the count."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return result


def _trace(config: PretrainedConfig, computation: Computation) -> Activations:
    """Counts one forward and backward pass of the decoder; gradients of weights are dropped once they are made."""
    model = build_model(config, computation.dtype, computation.lora_r, computation.adapter_dtype).train()
    if computation.recompute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers renames this method
            model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode():
        _to_fake(model)
        live = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            live.ignore(tensor)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with live:
            shape = computation.rows, computation.length, model.get_input_embeddings().embedding_dim
            embedded = torch.empty(shape, dtype=computation.dtype).requires_grad_()  # [B, T, H]
            with torch.autocast("cpu", torch.bfloat16, enabled=computation.autocast):
                hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False)[0]
                kept = live.now
            live.peak = live.now
            hidden.backward(torch.empty_like(hidden))
    return Activations(kept, live.peak - kept)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Kernel(torch.autograd.Function):
    """What a FlashAttention kernel keeps: queries, keys, values, its output, and one number of each token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Takes [S, heads, E], S tokens of all rows; see Dao et al., arXiv 2205.14135, algorithm 2."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Stands in for attention, [B, heads, T, E] to [B, T, heads, E]; laid out as in dft.batching.varlen_attention."""
    batch, heads, length, _ = query.shape
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    query, key, value = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if heads != key.shape[1] and not kernel_groups_heads():
        key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    return _Kernel.apply(query, key, value).unflatten(0, (batch, length)), None
