"""Metrics as sums over tokens, ranks and micro-batches, divided when they are printed."""

from collections.abc import Sequence

import torch

from dft.loss.from_logits import TokenStatistics

UNLIKELY, SURE = 0.01, 0.99  # p_correct, and w, that a token's learning can be told by


class TokenSums:
    """Sums over supervised tokens, kept on the device and divided only when they are printed.

    Args:
        num_channels: sources of the tokens, each with sums behind the others: nll, p_correct, is_top1, tokens.
    """

    # order of the entries of the tensor: what is known of each token, then of the micro-batch
    NLL, P_CORRECT, TOP1, WEIGHT, P_BELOW, P_ABOVE, WEIGHT_BELOW, ENTROPY = range(8)
    LOSS, TERMS, SUPERVISED, TOKENS, POSITIONS, PAIRS = range(8, 14)
    COUNT = 14
    OF_CHANNEL = 4

    def __init__(self, device: torch.device, num_channels: int = 0):
        # float64: a float32 sum stops counting single tokens at 2**24; MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(self.COUNT + self.OF_CHANNEL * num_channels, dtype=dtype, device=device)

    def add(
        self,
        loss_sum: torch.Tensor,
        num_terms: torch.Tensor,
        tokens: TokenStatistics,
        weights: torch.Tensor,
        lengths: torch.Tensor,
        num_positions: int,
        channel: torch.Tensor | None = None,
    ) -> None:
        """Adds one micro-batch, without waiting for the device.

        Args:
            loss_sum, num_terms: its loss, and what that is divided by; scalars.
            tokens, weights: statistics of its supervised tokens, and their w, [N].
            lengths: tokens of each of its documents.
            num_positions: its tokens and its padding.
            channel: the source of each supervised token, [N].
        """
        nll, p_correct = tokens.nll.detach(), tokens.p_correct
        of_token = (
            nll,
            p_correct,
            tokens.is_top1,
            weights,
            p_correct < UNLIKELY,
            p_correct > SURE,
            weights < UNLIKELY,
            torch.zeros_like(nll) if tokens.entropy is None else tokens.entropy,
        )
        each = torch.stack([x.to(nll.dtype) for x in of_token], dim=1).to(self.values.dtype)  # [N, 8]
        lengths = lengths.to(self.values.dtype)
        of_batch = (loss_sum.detach(), num_terms, len(nll), lengths.sum(), num_positions, lengths.square().sum())
        numbers = torch.cat([each.sum(0), torch.stack([self._number(x) for x in of_batch])])
        self.values.narrow(0, 0, self.COUNT).add_(numbers)
        if channel is not None:
            each = torch.cat([each.narrow(1, 0, 3), torch.ones_like(each.narrow(1, 0, 1))], dim=1)  # [N, 4]
            of_channels = self.values.narrow(0, self.COUNT, len(self.values) - self.COUNT)
            of_channels.view(-1, self.OF_CHANNEL).index_add_(0, channel, each)

    def _number(self, value: torch.Tensor | int) -> torch.Tensor:
        """A scalar on the device; a number of the host is written there by a kernel, where a copy would wait."""
        if isinstance(value, torch.Tensor):
            return value.to(self.values.dtype)
        return torch.full((), value, dtype=self.values.dtype, device=self.values.device)

    def take(self, accelerator) -> list[float]:
        """The sums over all ranks since the last call. A collective: every rank must call it."""
        total = accelerator.reduce(self.values, reduction="sum").tolist()
        self.values.zero_()
        return total


def averages(sums: list[float]) -> dict[str, float]:
    """Token averages of `TokenSums.take`: loss, ce_loss, avg_p_correct, acc. Zero where nothing was summed."""
    n = max(sums[TokenSums.SUPERVISED], 1.0)
    return {
        "loss": sums[TokenSums.LOSS] / max(sums[TokenSums.TERMS], 1.0),
        "ce_loss": sums[TokenSums.NLL] / n,
        "avg_p_correct": sums[TokenSums.P_CORRECT] / n,
        "acc": sums[TokenSums.TOP1] / n,
    }


def health(sums: list[float], with_entropy: bool = False) -> dict[str, float]:
    """How DFT sees the tokens of `TokenSums.take`: its mean weight, the shares of tokens at both ends, the entropy.

    A token with p near 0 has next to no gradient at alpha 1, one with p near 1 has nothing left to learn.
    """
    n = max(sums[TokenSums.SUPERVISED], 1.0)
    entropy = {"entropy": sums[TokenSums.ENTROPY] / n} if with_entropy else {}
    return {
        "mean_weight": sums[TokenSums.WEIGHT] / n,
        "p_below_0.01": sums[TokenSums.P_BELOW] / n,
        "p_above_0.99": sums[TokenSums.P_ABOVE] / n,
        **entropy,
    }


def channel_averages(sums: list[float], names: Sequence[str]) -> dict[str, float]:
    """channel/<name>/ce_loss, p_correct and acc of the sources that have tokens in `TokenSums.take`."""
    result = {}
    for i, name in enumerate(names):
        start = TokenSums.COUNT + TokenSums.OF_CHANNEL * i
        *found, count = sums[start : start + TokenSums.OF_CHANNEL]
        if count:
            keys = (f"channel/{name}/{key}" for key in ("ce_loss", "p_correct", "acc"))
            result |= {key: value / count for key, value in zip(keys, found, strict=True)}
    return result
