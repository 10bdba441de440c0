"""Metrics as sums over tokens, ranks and micro-batches, divided when they are printed."""

import torch

from dft_loss import TokenStatistics

UNLIKELY, SURE = 0.01, 0.99  # p_correct, and w, that a token's learning can be told by


class TokenSums:
    """Sums over supervised tokens, kept on the device and divided only when they are printed."""

    # order of the entries of the tensor
    LOSS, TERMS, NLL, P_CORRECT, TOP1, WEIGHT, P_BELOW, P_ABOVE, WEIGHT_BELOW = range(9)
    SUPERVISED, TOKENS, POSITIONS, PAIRS = range(9, 13)
    COUNT = 13

    def __init__(self, device: torch.device):
        # float64: a float32 sum stops counting single tokens at 2**24; MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(self.COUNT, dtype=dtype, device=device)

    def add(
        self,
        loss_sum: torch.Tensor,
        num_terms: torch.Tensor | int,
        tokens: TokenStatistics,
        weights: torch.Tensor,
        lengths: torch.Tensor,
        num_positions: int,
    ) -> None:
        """Adds one micro-batch.

        Args:
            loss_sum, num_terms: its loss, and what that is divided by; scalars.
            tokens, weights: statistics of its supervised tokens, and their w, [N].
            lengths: tokens of each of its documents.
            num_positions: its tokens and its padding.
        """
        lengths = lengths.to(self.values.dtype)
        parts = (
            loss_sum.detach(),
            num_terms,
            tokens.nll.detach().sum(),
            tokens.p_correct.sum(),
            tokens.is_top1.sum(),
            weights.sum(),
            (tokens.p_correct < UNLIKELY).sum(),
            (tokens.p_correct > SURE).sum(),
            (weights < UNLIKELY).sum(),
            tokens.nll.numel(),
            lengths.sum(),
            num_positions,
            lengths.square().sum(),
        )
        self.values += torch.stack(
            [torch.as_tensor(x, device=self.values.device).to(self.values.dtype) for x in parts]
        )

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


def health(sums: list[float]) -> dict[str, float]:
    """How DFT sees the tokens of `TokenSums.take`: its mean weight, and the shares of tokens at both ends.

    A token with p near 0 has next to no gradient at alpha 1, one with p near 1 has nothing left to learn.
    """
    n = max(sums[TokenSums.SUPERVISED], 1.0)
    return {
        "mean_weight": sums[TokenSums.WEIGHT] / n,
        "p_below_0.01": sums[TokenSums.P_BELOW] / n,
        "p_above_0.99": sums[TokenSums.P_ABOVE] / n,
    }
