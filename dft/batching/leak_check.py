"""Whether a model keeps documents apart that stand in one row."""

import torch
from torch import Tensor, nn

from dft.batching.collators import border_arguments
from dft.errors import UserError

LENGTH = 8  # tokens of each document of the check
LEAK = 0.1  # share of what would be seen if the documents were one


class LeakingDocuments(UserError):
    """Documents of one row see each other."""


def needs_check(inputs: dict) -> bool:
    """Whether a batch may hold several documents in a row that the model has to keep apart by itself."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim > 2:
        return False  # whoever made it keeps them apart
    return "cu_seq_lens_q" in inputs or ("position_ids" in inputs and mask is None)


@torch.no_grad()
def assert_apart(model: nn.Module, inputs: dict, vocab_size: int) -> bool:
    """Two documents in one row: changing the first must not change what the model says of the second.

    A measure is what it changes when both are one document. Calls the model, which may be wrapped, four times; all
    ranks must do it together.

    Args:
        inputs: a batch, whose kind of arguments is used.

    Returns:
        whether that could be told: not of a model whose logits are NaN, or don't depend on what came before.

    Raises:
        LeakingDocuments: it does change.
    """
    device = inputs["input_ids"].device
    ids = torch.arange(3 * LENGTH, device=device) % vocab_size
    first, other, second = ids.split(LENGTH)
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for so short a row
        apart, joined = (
            [_second(model, torch.cat([start, second])[None], lengths, inputs) for start in (first, other)]
            for lengths in ([LENGTH, LENGTH], [2 * LENGTH])
        )
    model.train(was_training)
    seen, whole = ((a - b).abs().max().item() for a, b in (apart, joined))
    if seen > LEAK * whole:
        raise LeakingDocuments(
            "documents of one row see each other with this model and attention implementation "
            f"(a change of one moves the logits of the next by {seen:.2g}, and by {whole:.2g} if they are one): "
            "use --batching padded"
        )
    return 0 < whole < float("inf")


def _second(model: nn.Module, ids: Tensor, lengths: list[int], inputs: dict) -> Tensor:
    """float32 logits [T, V] of the last tokens of a row of documents."""
    arguments = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": torch.ones_like(ids),
        **border_arguments(lengths),
        "use_cache": False,
    }
    arguments = {
        key: value.to(ids.device) if isinstance(value, Tensor) else value
        for key, value in arguments.items()
        if key in inputs
    }
    return model(**arguments).logits[0, -LENGTH:].float()
