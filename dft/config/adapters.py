"""Settings of LoRA adapters and of quantized weights, under the names that TRL has for them."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dft.config.options import option
from dft.errors import UserError

LoraInit = Literal["default", "gaussian", "orthogonal", "olora", "pissa"]
TAKE_OF_WEIGHTS = ("olora", "pissa")  # adapters that begin as a part of the weights, which is taken off these
OF_LORA = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"),
    *("use_rslora", "use_dora", "lora_init"),
)


@dataclass(frozen=True)
class AdapterConfig:
    """Whether adapters are trained in place of the model, and which.

    Raises:
        UserError: a value outside its range, or a flag that would have no effect.
    """

    _argument_group_name = "adapters"

    use_peft: bool = option(
        "Train LoRA adapters (https://arxiv.org/abs/2106.09685) and not the model; needs pip install -e .[adapters]. "
        "Their --learning_rate is usually about ten times that of full training: 1e-4 to 2e-4.",
        False,
    )
    adapter: str | None = option("Directory of a trained adapter to go on from, on the model that it was trained on.")
    lora_r: int = option("Rank of the adapters.", 16)
    lora_alpha: int = option("Adapters are multiplied by lora_alpha / lora_r.", 32)
    lora_dropout: float = option("Share of an adapter's inputs that is dropped in training.", 0.05)
    lora_target_modules: list[str] | None = option(
        "Names of the layers that get an adapter, such as q_proj v_proj; by default all linear ones but the head."
    )
    lora_modules_to_save: list[str] | None = option("Names of layers that are trained and saved whole.")
    use_rslora: bool = option("Multiply by lora_alpha / sqrt(lora_r) (https://arxiv.org/abs/2312.03732).", False)
    use_dora: bool = option("Train length and direction apart, DoRA (https://arxiv.org/abs/2402.09353).", False)
    lora_init: LoraInit = option(
        "How adapters begin. default, gaussian and orthogonal change nothing; pissa and olora take the strongest part "
        "of the weights, and the adapter that is saved fits the original weights.",
        "default",
    )
    load_in_4bit: bool = option("Hold the model's weights in 4 bits, under adapters (QLoRA).", False)
    load_in_8bit: bool = option("Hold the model's weights in 8 bits, under adapters.", False)
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("Type of the 4 bits.", "nf4")
    use_bnb_nested_quant: bool = option(
        "Quantize the scales of the 4 bits too.", False, ("--bnb_4bit_use_double_quant",)
    )

    def __post_init__(self):
        defaults = {f.name: f.default for f in fields(self)}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        of_lora = [name for name in OF_LORA if name in given]
        if of_lora and self.adapter:
            raise UserError(f"--{of_lora[0]}: the --adapter to go on from brings its own; leave it out")
        if of_lora and not self.use_peft:
            raise UserError(f"--{of_lora[0]} has no effect without adapters: add --use_peft True")
        of_4_bits = [name for name in given if "bnb" in name]
        if of_4_bits and not self.load_in_4bit:
            raise UserError(f"--{of_4_bits[0]} has no effect without --load_in_4bit True")
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit exclude each other")
        if self.is_quantized and not self.has_adapters:
            raise UserError("weights in 4 or 8 bits can't be trained, only adapters on them: add --use_peft True")
        if self.is_quantized and self.takes_of_weights:
            raise UserError(f"--lora_init {self.lora_init} changes the weights, which those in 4 or 8 bits can't be")
        if min(self.lora_r, self.lora_alpha) < 1:
            raise UserError(f"--lora_r is {self.lora_r}, --lora_alpha {self.lora_alpha}; both must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout is {self.lora_dropout}; it must be from 0 to below 1")

    @property
    def has_adapters(self) -> bool:
        return self.use_peft or self.adapter is not None

    @property
    def facts(self) -> dict[str, Any]:
        """What has to be the same where a run is resumed; nothing without adapters."""
        return {name: value for name, value in asdict(self).items() if name != "adapter"} if self.has_adapters else {}

    @property
    def shown(self) -> dict[str, Any]:
        """The settings that have an effect, as people read them; None for what isn't set."""
        values: dict[str, Any] = {}
        if self.adapter:
            values["adapter that was gone on from"] = Path(self.adapter).name
        elif self.use_peft:
            values = {name: getattr(self, name) for name in OF_LORA}
            values["lora_target_modules"] = " ".join(self.lora_target_modules or ["all linear layers but the head"])
            values["lora_modules_to_save"] = " ".join(self.lora_modules_to_save or []) or None
        if self.is_quantized:
            values["weights under the adapters"] = self.bnb_4bit_quant_type if self.load_in_4bit else "8 bits"
        return values

    @property
    def is_quantized(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    @property
    def takes_of_weights(self) -> bool:
        return self.lora_init in TAKE_OF_WEIGHTS
