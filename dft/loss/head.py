"""The DFT loss inside the model's own forward, in place of its output embedding (the head).

For one call of the model, a function stands in for its head. It computes the loss, inside a call of the head so that
ZeRO-3 and FSDP gather its weights, and returns known numbers (a probe) instead of logits. They pass through whatever
the model does to its logits and come out as the model's `logits`: the first call verifies with them that the loss was
computed from the same logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from dft.errors import UserError
from dft.loss.from_logits import NO_DATA, TokenData
from dft.loss.fused import LogitTransform, chunked_dft_loss_sum, fused_dft_loss_sum
from dft.loss.statistics import Needs, TokenStatistics
from dft.loss.token_weight import TokenWeight


class UnsupportedHead(UserError):
    """The loss can't be computed in this model's head; the message says why."""


@dataclass
class HeadLoss:
    """The loss of one micro-batch: what it is computed from and, once the head was called, the result."""

    labels: Tensor  # [B, T]
    token_weight: TokenWeight
    data: TokenData
    needs: Needs | None
    loss_sum: Tensor | None = None  # scalar, float32
    tokens: TokenStatistics | None = None

    def take(self, logits: Tensor) -> tuple[Tensor, TokenStatistics]:
        """The loss and the tokens' statistics. Backward also goes through `logits`, the model's, with a gradient of 0.

        DDP, FSDP and DeepSpeed hang their hooks on the model's outputs: a backward pass that didn't go through them
        would neither gather weights nor reduce gradients.

        Raises:
            UnsupportedHead: the head was not called.
        """
        if self.loss_sum is None or self.tokens is None:
            raise UnsupportedHead("the model's forward doesn't call its output embedding")
        return self.loss_sum + torch.nan_to_num(0.0 * logits.float().sum()), self.tokens


class LossHead:
    """Computes the DFT loss in the head of one model.

    Args:
        model: not wrapped by DDP, FSDP or DeepSpeed yet.
        chunk_mb: MB of float32 logits at once.

    Attributes:
        wrapping: what makes the head more than a linear layer, in words, "" for nothing. A linear layer's weights are
            used directly; any other head is called chunk by chunk.

    Raises:
        UnsupportedHead: the model has no head that its forward calls by name.
    """

    def __init__(self, model: PreTrainedModel, chunk_mb: float):
        head = model.get_output_embeddings()
        places = [(owner, name) for owner in model.modules() for name, m in owner.named_children() if m is head]
        if head is None or not places:
            raise UnsupportedHead(f"{type(model).__name__} has no output embedding")
        config = model.config.get_text_config()
        self.wrapping = _wrapping(head)
        self.transform = logit_transform(config)
        self._head = head
        self._owner, self._name = places[0]
        self._vocab_size = config.vocab_size
        self._chunk_mb = chunk_mb
        self._is_checked = False

    @contextmanager
    def computing(
        self,
        labels: Tensor,
        token_weight: TokenWeight,
        data: TokenData = NO_DATA,
        needs: Needs | None = None,
    ) -> Iterator[HeadLoss]:
        """Inside this context, a call of the model computes the DFT loss, to be taken from the yielded HeadLoss.

        Args:
            labels: [B, T]. The others: see from_logits.dft_loss_sum.
        """
        loss = HeadLoss(labels, token_weight, data, needs)
        self._owner.__dict__[self._name] = partial(self._stand_in, loss)  # hides the module of this name
        try:
            yield loss
        finally:
            del self._owner.__dict__[self._name]

    def _stand_in(self, loss: HeadLoss, hidden: Tensor) -> Tensor:
        """Called by the model in place of its head: hidden states [B, T, H] to the probe, [1, 1, V]."""
        if loss.loss_sum is not None:
            raise UnsupportedHead("the model's forward calls its output embedding more than once")
        rows, length = hidden.shape[:2]
        if loss.labels.shape not in ((rows, length), (rows, length + 1)):  # see from_logits.supervised_rows
            raise UnsupportedHead(
                f"the head sees hidden states of {list(hidden.shape)} for labels of {list(loss.labels.shape)}"
            )
        if self.wrapping:
            connected = self._chunked(loss, hidden)
        else:
            self._head.forward = partial(self._fused, loss)
            try:
                connected = self._head(hidden)  # hooks around the call gather sharded weights
            finally:
                del self._head.forward
        # connected to the loss, see HeadLoss.take
        return _probe(self._vocab_size, hidden.device) + torch.nan_to_num(0.0 * connected)

    def _fused(self, loss: HeadLoss, hidden: Tensor) -> Tensor:
        """Computes the loss from the head's weights, in place of the head's own forward."""
        loss.loss_sum, loss.tokens = fused_dft_loss_sum(
            hidden,
            self._head.weight,
            loss.labels,
            loss.token_weight,
            loss.data,
            bias=self._head.bias,
            transform=self.transform,
            chunk_mb=self._chunk_mb,
            needs=loss.needs,
        )
        return loss.loss_sum

    def _chunked(self, loss: HeadLoss, hidden: Tensor) -> Tensor:
        """Computes the loss by calling the head."""
        # under ZeRO-3 and FSDP2 each call of the head is a collective, and ranks have different numbers of chunks
        is_sharded = any(hasattr(parameter, "ds_id") for parameter in self._head.parameters())
        is_sharded |= any(isinstance(module, FSDPModule) for module in self._head.modules())
        loss.loss_sum, loss.tokens = chunked_dft_loss_sum(
            hidden,
            self._head,
            loss.labels,
            loss.token_weight,
            loss.data,
            transform=self.transform,
            chunk_mb=float("inf") if is_sharded else self._chunk_mb,
            vocab_size=self._vocab_size,
            needs=loss.needs,
        )
        return loss.loss_sum

    def check(self, logits: Tensor) -> None:
        """Verifies at the first call that the model transforms the probe as `transform` does.

        Raises:
            UnsupportedHead: it doesn't.
        """
        if self._is_checked:
            return
        probe = _probe(self._vocab_size, logits.device)
        expected = self.transform(probe)
        if logits.shape != expected.shape or not torch.allclose(logits.float(), expected, rtol=1e-2, atol=1e-2):
            raise UnsupportedHead("the model changes its logits in a way that is not known")
        self._is_checked = True


def _probe(size: int, device: torch.device) -> Tensor:
    """The probe: logits [1, 1, V] from -40 to 40."""
    return torch.linspace(-40.0, 40.0, size, device=device)[None, None]


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """How a model transforms its logits, as far as its configuration says."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))  # Gemma


def _wrapping(head: nn.Module) -> str:
    """What makes a head more than its weights, in words: an adapter, quantized weights, hooks. "" for nothing."""
    if type(head) is not nn.Linear:
        package = type(head).__module__.partition(".")[0]
        return "the head has an adapter" if package == "peft" else f"the head is a {type(head).__name__} of {package}"
    if "forward" in vars(head):
        return "the head's forward is replaced"
    if any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)):
        return "the head has hooks"
    return ""
