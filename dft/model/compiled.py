"""Compile a model's layers with torch.compile."""

from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_repeated_blocks
from transformers import PreTrainedModel, TrainingArguments


def compile_layers(model: PreTrainedModel, accelerator: Accelerator, args: TrainingArguments) -> None:
    """Compiles the layers of a model in place, and leaves what is around them, such as the head, as it is.

    The loss head replaces the head's forward during a call, which a compiled model would not see. accelerate, which
    would compile the whole model or put copies of the layers in their place, is told not to.

    Args:
        args: torch_compile_backend and torch_compile_mode are used.

    Raises:
        ValueError: the model has no stack of layers.
    """
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    stacks = [module for module in model.modules() if is_repeated_blocks(module)]
    if not stacks:
        raise ValueError(f"torch_compile: {type(model).__name__} has no stack of layers to compile")
    for layer in (layer for stack in stacks for layer in stack):
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
