"""The loss of a micro-batch by the model's head, where that is possible, or else from its logits."""

import logging
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dft.config.loss import FusedLoss
from dft.loss.from_logits import NO_DATA, TokenData, dft_loss_sum
from dft.loss.head import LossHead, UnsupportedHead
from dft.loss.statistics import Needs, TokenStatistics
from dft.loss.token_weight import TokenWeight

logger = logging.getLogger(__name__)


class Scorer:
    """Calls a model and computes the DFT loss of its micro-batch, summed over tokens.

    Args:
        model: not wrapped by DDP, FSDP or DeepSpeed yet.
        fused_loss: on computes the loss in the head; off from logits; auto in the head if it is one that is known.
            With auto, a head that turns out at the first call to be another one is given up, with a warning.
        chunk_mb: MB of logits that the head holds at once.
        needs: what the statistics of the tokens have to hold; by default what the weight needs.

    Attributes:
        head: computes the loss; None where it is computed from logits.

    Raises:
        UnsupportedHead: fused_loss is on, and this model's head is not one that is known.
    """

    def __init__(self, model: PreTrainedModel, fused_loss: FusedLoss, chunk_mb: float, needs: Needs | None = None):
        self.head: LossHead | None = None
        self._fused_loss = fused_loss
        self._needs = needs
        if fused_loss == "off":
            return
        try:
            self.head = LossHead(model, chunk_mb)
        except UnsupportedHead as error:
            self._give_up_head(error)
            return
        wrapping = self.head.wrapping
        how = f"called chunk by chunk ({wrapping})" if wrapping else "fused with the loss"
        logger.info("Loss: the head is %s, no more than %g MB of logits at once", how, chunk_mb)

    def score(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: Tensor,
        token_weight: TokenWeight,
        data: TokenData = NO_DATA,
        needs_logits: bool = False,
    ) -> tuple[Tensor, TokenStatistics, Any]:
        """sum(c * w * nll) (scalar), the statistics of the tokens, and the model's outputs.

        Args:
            model: may be wrapped.
            inputs: of the model, without labels.
            labels: [B, T]. token_weight, data: see from_logits.dft_loss_sum.
            needs_logits: the outputs must hold the model's logits; they don't where the head computes the loss.

        Raises:
            UnsupportedHead: fused_loss is on, and the head can't compute the loss.
        """
        if self.head is None or needs_logits:
            outputs = model(**inputs)
            return *dft_loss_sum(outputs.logits, labels, token_weight, data, self._needs), outputs
        try:
            with self.head.computing(labels, token_weight, data, self._needs) as loss:
                outputs = model(**inputs)
            loss_sum, tokens = loss.take(outputs.logits)
            self.head.check(outputs.logits)
        except UnsupportedHead as error:
            self._give_up_head(error)
            return self.score(model, inputs, labels, token_weight, data)
        return loss_sum, tokens, outputs

    def _give_up_head(self, error: UnsupportedHead) -> None:
        if self._fused_loss == "on":
            raise UnsupportedHead(f"fused_loss is on, but {error}; turn it off") from error
        logger.warning("Loss: from the model's logits, which takes more memory: %s", error)
        self.head = None
