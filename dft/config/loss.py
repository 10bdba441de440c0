"""Settings of the DFT loss."""

from dataclasses import dataclass
from typing import Literal

from dft.config.objectives import OBJECTIVES, describe_parameters, read_arguments
from dft.config.options import option
from dft.errors import UserError

Normalization = Literal["token", "turn"]
FusedLoss = Literal["auto", "on", "off"]
ObjectiveName = Literal[
    *("dft", "sft", "threshold", "eaft", "deft", "idft", "talr", "chord", "prior", "anchored", "importance")
]

# MB of float32 logits that the fused loss holds at once. Larger chunks save little time: cpu, benchmarks/loss_head.py;
# cuda, some 1,700 rows of a vocabulary of 150,000, benchmarks/results/gpu.md.
CHUNK_MB = {"cpu": 48.0, "cuda": 1024.0}
CHUNKS_OF_GROUP = 6  # whose gradients in 16 bits are held for one product; they take half the room of logits


@dataclass(frozen=True)
class LossConfig:
    """The weight of a token's cross-entropy, what the sum is divided by, and where it is computed.

    Raises:
        UserError: a value outside its range.
    """

    _argument_group_name = "DFT loss"

    objective: ObjectiveName = option(
        "What the weight of a token is: "
        + "; ".join(f"{name}: {about.formula}" for name, about in OBJECTIVES.items())
        + ". See docs/objectives.md.",
        "dft",
    )
    objective_args: list[str] | None = option(
        "Parameters of the objective, name=value …, with their defaults: " + describe_parameters() + "."
    )
    dft_alpha: float = option(
        "Weight of a token: alpha * objective + 1 - alpha, by default alpha * p_correct + 1 - alpha. 0 is plain SFT, "
        "1 is pure DFT.",
        1.0,
    )
    use_simple_dft: bool = option("False switches DFT off: plain cross-entropy, as --dft_alpha 0.", True)
    dft_gamma: float = option("Power of p_correct in the weight of the objective dft, above 0.", 1.0)
    dft_floor: float = option("The least weight of a token, from 0 to 1.", 0.0)
    dft_alpha_warmup_ratio: float = option(
        "Share of the steps, from 0 to 1, in which alpha rises linearly from 0 (SFT) to --dft_alpha.", 0.0
    )
    dft_special_tokens: Literal["dft", "ce"] = option(
        "ce: plain cross-entropy for end-of-turn and other special tokens, so that a base model learns to stop; dft: "
        "they are weighted as all others.",
        "dft",
    )
    loss_normalization: Normalization = option(
        "token: the mean over the supervised tokens of the global batch. turn: the mean over its assistant turns, "
        "each the mean over its tokens.",
        "token",
    )
    fused_loss: FusedLoss = option(
        "Compute the loss inside the model's head, without holding logits. auto: where the head is one that is known; "
        "on: stop where it isn't; off: from the model's logits.",
        "auto",
    )
    loss_chunk_mb: float | None = option(
        "MB of logits that the fused loss holds at once; by default "
        f"{CHUNK_MB['cpu']:g}, and {CHUNK_MB['cuda']:g} on GPUs."
    )

    reference_cache_dir: str | None = option(
        "Directory for log-probabilities by the starting weights, which prior, anchored and importance need: other "
        "runs of the same model and data find them there. By default one beside datasets' cache."
    )

    def __post_init__(self):
        check_mixture(self.dft_alpha, self.dft_floor)
        if not 0 < self.dft_gamma < float("inf"):
            raise UserError(f"--dft_gamma is {self.dft_gamma}; it must be above 0")
        read_arguments(self.objective, self.objective_args)
        self._refuse_what_the_objective_ignores()
        if not 0 <= self.dft_alpha_warmup_ratio <= 1:
            raise UserError(f"--dft_alpha_warmup_ratio is {self.dft_alpha_warmup_ratio}; it must be between 0 and 1")
        if self.loss_chunk_mb is not None and not 0 < self.loss_chunk_mb < float("inf"):
            raise UserError(f"--loss_chunk_mb is {self.loss_chunk_mb}; it must be above 0")
        for name, values in (("loss_normalization", ("token", "turn")), ("fused_loss", ("auto", "on", "off"))):
            if getattr(self, name) not in values:
                raise UserError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")

    def _refuse_what_the_objective_ignores(self) -> None:
        """Flags that would have no effect, or another one than they say."""
        if self.objective != "dft" and self.dft_gamma != 1.0:
            raise UserError(f"--dft_gamma belongs to --objective dft, not to {self.objective}: leave it out")
        if self.objective not in ("dft", "sft") and not self.use_simple_dft:
            raise UserError("--use_simple_dft False is plain cross-entropy; leave out either it or the --objective")
        if self.objective == "anchored" and self.dft_floor > 0:
            raise UserError("--dft_floor would cut the negative weights that hold the model in --objective anchored")
        given = [name for name in ("dft_floor", "dft_alpha_warmup_ratio") if getattr(self, name) > 0]
        if self.objective == "sft" and given:
            raise UserError(f"--{given[0]} has no effect on --objective sft, whose weights are all 1")

    @property
    def alpha(self) -> float:
        """The alpha in force after its warm-up; 0 where the loss is plain cross-entropy."""
        return self.dft_alpha if self.use_simple_dft and self.objective != "sft" else 0.0

    @property
    def objective_arguments(self) -> dict[str, float]:
        """All parameters of the objective, {name: value}."""
        return read_arguments(self.objective, self.objective_args)

    @property
    def formula(self) -> str:
        """The weight of a token with the numbers of this configuration, in words."""
        formula = f"p**{self.dft_gamma:g}" if self.objective == "dft" else OBJECTIVES[self.objective].formula
        values = ", ".join(f"{name} {value:g}" for name, value in self.objective_arguments.items())
        return f"{formula} ({values})" if values else formula


def check_mixture(alpha: float, floor: float) -> None:
    """The ranges of alpha and the floor.

    Raises:
        UserError: a value outside its range.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"--dft_alpha is {alpha}; it must be between 0 (SFT) and 1 (pure DFT)")
    if not 0 <= floor <= 1:
        raise UserError(f"--dft_floor is {floor}; it must be between 0 and 1")
