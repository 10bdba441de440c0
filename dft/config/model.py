"""Settings of the model: where it comes from, its type and its attention."""

from dataclasses import dataclass
from typing import Any, Literal

from dft.config.options import option, required


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and how it is loaded."""

    _argument_group_name = "model"

    model_name_or_path: str = required("Model directory, or a name on the model hub.")
    model_revision: str = option("Branch, tag or commit of a model from the hub.", "main")
    torch_dtype: Literal["bfloat16", "float16", "float32", "auto"] = option(
        "Type the weights are loaded in; auto keeps that of the files.", "bfloat16", ("--dtype",)
    )
    attn_implementation: str = option(
        "auto, flash_attention_4, flash_attention_3, flash_attention_2, varlen, sdpa, eager, or another name that "
        "transformers knows. auto is the newest FlashAttention that is installed and can run, else varlen (the "
        "kernels inside PyTorch) where the model can use it, else sdpa.",
        "auto",
    )
    attn_strict: bool = option(
        "Stop, instead of falling back, where the FlashAttention that is asked for can't run.", False
    )
    resize_embeddings: bool = option(
        "Add rows to the model's embedding for tokens of the tokenizer that have none; they begin as the mean of the "
        "others.",
        False,
    )
    trust_remote_code: bool = option("Run Python code that comes with the model. Only for sources you trust.", False)

    @property
    def source(self) -> dict[str, Any]:
        """The keyword arguments of every from_pretrained that say where the model comes from."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}
