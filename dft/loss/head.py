"""Where the loss is computed: inside the model's own forward, in place of its output embedding (the head).

For one call of the model, a function stands in for its head. It computes the loss, within a call of the head
so that sharded weights are gathered, and returns known numbers instead of logits. They pass through whatever
the model does to its logits and come out as its `logits`: at the first call it is seen there, not believed,
that the loss was made of the same logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dft.errors import UserError
from dft.loss.from_logits import TokenStatistics, TokenWeight
from dft.loss.fused import LogitTransform, chunked_dft_loss_sum, fused_dft_loss_sum


class UnsupportedHead(UserError, ValueError):
    """Why the loss can't be computed in a model's head."""


@dataclass
class HeadLoss:
    """The loss that the head has made of one micro-batch."""

    loss_sum: Tensor | None = None  # scalar, float32
    tokens: TokenStatistics | None = None

    def take(self, logits: Tensor) -> tuple[Tensor, TokenStatistics]:
        """Both. The backward pass then goes through the model's outputs, `logits`, with a gradient of zero.

        DDP, FSDP and DeepSpeed look for it there: it tells them to gather weights and to reduce gradients.

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
        wrapping: what the head is more than a linear layer, in words; it is then called chunk by chunk,
            otherwise its weights are used. "" for a linear layer.

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
        self, labels: Tensor, weight: TokenWeight, scales: Tensor | None = None, with_entropy: bool = False
    ) -> Iterator[HeadLoss]:
        """Within it, a call of the model makes the DFT loss of `labels` [B, T], to be taken from what it yields.

        weight, scales, with_entropy: see dft_loss.dft_loss_sum.
        """
        result = HeadLoss()

        def fused(hidden: Tensor) -> Tensor:
            """Hidden states [B, T, H] to the loss, in place of the head's own forward."""
            result.loss_sum, result.tokens = fused_dft_loss_sum(
                *(hidden, self._head.weight, labels, weight, scales),
                bias=self._head.bias,
                transform=self.transform,
                chunk_mb=self._chunk_mb,
                with_entropy=with_entropy,
            )
            return result.loss_sum

        def chunked(hidden: Tensor) -> Tensor:
            """The same, with calls of the head."""
            # ZeRO-3: each call of the head is a collective, and ranks have different numbers of chunks
            is_sharded = any(hasattr(parameter, "ds_id") for parameter in self._head.parameters())
            result.loss_sum, result.tokens = chunked_dft_loss_sum(
                *(hidden, self._head, labels, weight, scales),
                transform=self.transform,
                chunk_mb=float("inf") if is_sharded else self._chunk_mb,
                vocab_size=self._vocab_size,
                with_entropy=with_entropy,
            )
            return result.loss_sum

        def stand_in(hidden: Tensor) -> Tensor:
            """What the model calls in place of its head: hidden states [B, T, H] to known numbers [1, 1, V]."""
            if result.loss_sum is not None:
                raise UnsupportedHead("the model's forward calls its output embedding more than once")
            if hidden.shape[:2] != labels.shape:
                raise UnsupportedHead(
                    f"the head sees hidden states of {list(hidden.shape)} for labels of {list(labels.shape)}"
                )
            if self.wrapping:
                connected = chunked(hidden)
            else:
                self._head.forward = fused
                try:
                    connected = self._head(hidden)  # hooks around it gather sharded weights
                finally:
                    del self._head.forward
            # connected to the loss, see HeadLoss.take
            return _probe(self._vocab_size, hidden.device) + torch.nan_to_num(0.0 * connected)

        self._owner.__dict__[self._name] = stand_in  # hides the module of this name from the model's forward
        try:
            yield result
        finally:
            del self._owner.__dict__[self._name]

    def check(self, logits: Tensor) -> None:
        """Compares what the first call of the model made of the known numbers with what the loss is made of.

        Raises:
            UnsupportedHead: it is something else.
        """
        if self._is_checked:
            return
        probe = _probe(self._vocab_size, logits.device)
        expected = self.transform(probe)
        if logits.shape != expected.shape or not torch.allclose(logits.float(), expected, rtol=1e-2, atol=1e-2):
            raise UnsupportedHead("the model changes its logits in a way that is not known")
        self._is_checked = True


def _probe(size: int, device: torch.device) -> Tensor:
    """Logits [1, 1, V] from -40 to 40."""
    return torch.linspace(-40.0, 40.0, size, device=device)[None, None]


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the model of a configuration does to its logits, as far as it is said there."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None))  # Gemma


def _wrapping(head: nn.Module) -> str:
    """What makes a head more than its weights: an adapter, quantized weights, hooks."""
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    if "forward" in vars(head):
        return "the head's forward is replaced"
    if any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)):
        return "the head has hooks"
    return ""
