"""What to tell a user whose objective teaches little: the setting that would help in the case at hand."""

from dft.metrics.token_sums import SURE, UNLIKELY, TokenSums

MANY = 0.5  # share of tokens from which on a weight near 0 is worth a word
CLIPPED = 0.01  # share of ratios to the starting weights


def advice_on_weights(objective: str, sums: list[float]) -> str | None:
    """What to do about weights near 0; None where they are rare, or say that all is learned.

    Args:
        objective: its name; "custom" for a function of the user's own.
        sums: of `TokenSums.take`.
    """
    n = max(sums[TokenSums.SUPERVISED], 1.0)
    share, unlikely, sure = (sums[i] / n for i in (TokenSums.WEIGHT_BELOW, TokenSums.P_BELOW, TokenSums.P_ABOVE))
    if share <= MANY:
        return None
    told = f"{share:.0%} of the supervised tokens have a DFT weight below {UNLIKELY:g}: "
    if sure > MANY:
        return f"{told}the model is already sure (p above {SURE:g}) of {sure:.0%}, and {objective} passes over these"
    if objective == "threshold":
        return f"{told}their p is below the threshold. Lower it (objective_args tau=…), or set a dft_floor (0.1)"
    if objective == "prior":
        return (
            f"{told}the weights that the training began with hardly expect them, and they keep this weight. Lower "
            "dft_alpha (0.7), set a dft_floor (0.1), or take objective dft, whose weights grow with what is learned"
        )
    if unlikely <= MANY:
        return f"{told}so they are hardly learned. Lower dft_alpha (0.7), set a dft_floor (0.1), or take objective dft"
    floor, anchored = "set a dft_floor (0.1), ", "; if it must not forget, objective anchored with dft_alpha 0.7"
    if objective == "anchored":  # which has no floor
        floor = anchored = ""
    return (
        f"{told}the model hardly expects them, so it hardly learns them. Lower dft_alpha (0.7), {floor}let alpha rise "
        "(dft_alpha_warmup_ratio), or train with dft_alpha 0 first; if only the ends of turns are not learned, "
        f"dft_special_tokens ce{anchored}"
    )


def advice_on_ratios(objective: str, sums: list[float]) -> str | None:
    """What to do about ratios to the starting weights that were clipped; None where they are rare."""
    share = sums[TokenSums.CLIPPED] / max(sums[TokenSums.SUPERVISED], 1.0)
    if share <= CLIPPED:
        return None
    remedy = "raise strength or max_ratio" if objective == "anchored" else "widen low and high"
    return (
        f"{share:.1%} of the ratios of p to that of the starting weights are clipped: the model has moved far from "
        f"them on these tokens. Lower the learning rate, or {remedy} (objective_args)"
    )
