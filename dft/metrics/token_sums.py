"""Metrics as sums over tokens, micro-batches and ranks, divided once, when they are printed.

Shapes: N supervised tokens, D documents, C channels.
"""

from collections.abc import Sequence

import torch

from dft.loss.statistics import TokenStatistics

# Thresholds of the p_below and p_above metrics. UNLIKELY also marks the DFT weights that the warning about hardly any
# learning counts.
UNLIKELY, SURE = 0.01, 0.99


class TokenSums:
    """Sums over supervised tokens, kept on the device so that adding to them never waits for it.

    Args:
        num_channels: C, the sources of the tokens, each of which has sums of its own: nll, p_correct, top-1, tokens.

    Attributes:
        values: [COUNT + CHANNEL_COUNT·C]; the class constants name the entries.
    """

    # sums over supervised tokens, in the order of _token_values
    NLL, P_CORRECT, TOP1, WEIGHT, P_BELOW, P_ABOVE, WEIGHT_BELOW, ENTROPY, CLIPPED = range(9)
    # sums over micro-batches; PAIRS are the pairs of tokens of a document, which attention compares
    LOSS, TERMS, SUPERVISED, TOKENS, POSITIONS, PAIRS = range(9, 15)
    COUNT = 15
    CHANNEL_COUNT = 4  # NLL, P_CORRECT and TOP1 of a channel, and its supervised tokens

    def __init__(self, device: torch.device, num_channels: int = 0):
        # a float32 sum stops counting single tokens at 2**24, but MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(self.COUNT + self.CHANNEL_COUNT * num_channels, dtype=dtype, device=device)

    def add(
        self,
        loss_sum: torch.Tensor,
        num_terms: torch.Tensor,
        tokens: TokenStatistics,
        is_clipped: torch.Tensor | None,
        lengths: torch.Tensor,
        num_positions: int,
        channel: torch.Tensor | None = None,
    ) -> None:
        """Adds one micro-batch, without waiting for the device.

        Args:
            loss_sum, num_terms: its summed loss and the divisor of that, scalars.
            tokens: statistics of its supervised tokens, with their weights.
            is_clipped: which of their ratios to the starting weights were clipped, [N]; None where there are none.
            lengths: tokens of each of its documents, int [D].
            num_positions: positions that the model computed: tokens and padding.
            channel: the channel of each supervised token, int64 [N].
        """
        values = self._token_values(tokens, is_clipped)  # [N, 9]
        lengths = lengths.to(self.values.dtype)
        of_batch = (loss_sum.detach(), num_terms, len(values), lengths.sum(), num_positions, lengths.square().sum())
        sums = torch.cat([values.sum(0), torch.stack([self._scalar(x) for x in of_batch])])
        self.values.narrow(0, 0, self.COUNT).add_(sums)
        if channel is not None:
            values = torch.cat([values.narrow(1, 0, 3), torch.ones_like(values.narrow(1, 0, 1))], dim=1)  # [N, 4]
            of_channels = self.values.narrow(0, self.COUNT, len(self.values) - self.COUNT)
            of_channels.view(-1, self.CHANNEL_COUNT).index_add_(0, channel, values)

    def _token_values(self, tokens: TokenStatistics, is_clipped: torch.Tensor | None) -> torch.Tensor:
        """What is summed over tokens, [N, 9], in the order of the class constants."""
        nll, p_correct, weights = tokens.nll.detach(), tokens.p_correct, tokens.weight
        columns = (
            nll,
            p_correct,
            tokens.is_top1,
            weights,
            p_correct < UNLIKELY,
            p_correct > SURE,
            weights.abs() < UNLIKELY,  # an anchored weight may be negative
            torch.zeros_like(nll) if tokens.entropy is None else tokens.entropy,
            torch.zeros_like(nll) if is_clipped is None else is_clipped,
        )
        return torch.stack([column.to(nll.dtype) for column in columns], dim=1).to(self.values.dtype)

    def _scalar(self, value: torch.Tensor | int) -> torch.Tensor:
        """A scalar on the device. A number is filled in by a kernel, because copying it from the host would wait."""
        if isinstance(value, torch.Tensor):
            return value.to(self.values.dtype)
        return torch.full((), value, dtype=self.values.dtype, device=self.values.device)

    def take(self, accelerator) -> list[float]:
        """Returns the sums over all ranks since the last call, and starts anew. All ranks must call it together."""
        total = accelerator.reduce(self.values, reduction="sum").tolist()
        self.values.zero_()
        return total


def averages(sums: list[float]) -> dict[str, float]:
    """Divides the sums of `TokenSums.take`: loss, ce_loss, avg_p_correct, acc; all 0 if nothing was summed.

    loss is sum(w·nll) divided by supervised tokens or turns; the others are means over supervised tokens.
    """
    n = max(sums[TokenSums.SUPERVISED], 1.0)
    return {
        "loss": sums[TokenSums.LOSS] / max(sums[TokenSums.TERMS], 1.0),
        "ce_loss": sums[TokenSums.NLL] / n,
        "avg_p_correct": sums[TokenSums.P_CORRECT] / n,
        "acc": sums[TokenSums.TOP1] / n,
    }


def health(sums: list[float], with_entropy: bool = False, with_ratio: bool = False) -> dict[str, float]:
    """Metrics of how much there is to learn: mean DFT weight, shares of unlikely and of sure tokens, mean entropy.

    A token with p near 0 has next to no gradient at alpha 1, one with p near 1 has nothing left to learn.

    Args:
        sums: of `TokenSums.take`.
        with_entropy: whether the entropy, in nats, was computed.
        with_ratio: whether the objective clips ratios to the starting weights.
    """
    n = max(sums[TokenSums.SUPERVISED], 1.0)
    more = {"entropy": sums[TokenSums.ENTROPY] / n} if with_entropy else {}
    if with_ratio:
        more["ratio_clipped"] = sums[TokenSums.CLIPPED] / n
    return {
        "mean_weight": sums[TokenSums.WEIGHT] / n,
        "p_below_0.01": sums[TokenSums.P_BELOW] / n,
        "p_above_0.99": sums[TokenSums.P_ABOVE] / n,
        **more,
    }


def channel_averages(sums: list[float], names: Sequence[str]) -> dict[str, float]:
    """channel/NAME/ce_loss, p_correct and acc of each channel that has tokens in the sums of `TokenSums.take`.

    Args:
        names: of all channels, in the order of their numbers.
    """
    result = {}
    for i, name in enumerate(names):
        start = TokenSums.COUNT + TokenSums.CHANNEL_COUNT * i
        *channel_sums, count = sums[start : start + TokenSums.CHANNEL_COUNT]
        if count:
            keys = (f"channel/{name}/{key}" for key in ("ce_loss", "p_correct", "acc"))
            result |= {key: value / count for key, value in zip(keys, channel_sums, strict=True)}
    return result
