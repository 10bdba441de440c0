"""A micro-batch taken apart: what the model gets, and what the loss knows of each token.

Shapes: B rows, T tokens of a row, D documents, N supervised tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dft.batching.collators import document_lengths, token_channels
from dft.config.loss import Normalization
from dft.constants import REFERENCE_COLUMN
from dft.loss.from_logits import TokenData, count_terms, loss_weight_of_tokens, values_of_tokens
from dft.loss.statistics import TokenStatistics


@dataclass(frozen=True)
class Batch:
    """What a collator made of rows.

    Attributes:
        inputs: of the model.
        labels, loss_weights, reference_log_p: [B, T]; the last two may be None.
        channel: [D], or None.
    """

    inputs: dict[str, Any]
    labels: Tensor
    loss_weights: Tensor | None
    reference_log_p: Tensor | None
    channel: Tensor | None

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> "Batch":
        """Takes apart what the trainer gives to compute_loss."""
        inputs = dict(inputs)
        inputs.pop("skip_logits", None)  # Trainer asks Liger's models to skip them in evaluation
        columns = [inputs.pop(name, None) for name in ("loss_weights", REFERENCE_COLUMN, "channel")]
        return cls(inputs, inputs.pop("labels"), *columns)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document, int [D]."""
        return document_lengths(self.inputs)

    @property
    def num_positions(self) -> int:
        """Positions that the model computes: tokens and padding."""
        return self.inputs["input_ids"].numel()

    def count_terms(self, normalization: Normalization) -> Tensor:
        """See from_logits.count_terms."""
        return count_terms(self.labels, normalization)

    def token_data(self, normalization: Normalization) -> TokenData:
        """What is known of the supervised tokens, each [N]."""
        loss_weight = loss_weight_of_tokens(self.labels, self.loss_weights, normalization)
        if self.reference_log_p is None:
            return TokenData(loss_weight)
        return TokenData(loss_weight, values_of_tokens(self.reference_log_p, self.labels))

    def document_of(self, tokens: TokenStatistics) -> Tensor:
        """The document of each supervised token, int64 [N]."""
        documents = torch.arange(len(self.lengths), device=self.labels.device)
        return self._spread(documents, tokens)

    def channel_of(self, tokens: TokenStatistics) -> Tensor | None:
        """The channel of each supervised token, int64 [N]; None where the rows have none."""
        return None if self.channel is None else self._spread(self.channel, tokens)

    def _spread(self, values: Tensor, tokens: TokenStatistics) -> Tensor:
        return token_channels(values, self.labels, self.inputs).flatten()[tokens.places]
