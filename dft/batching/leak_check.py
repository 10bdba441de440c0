"""Check on the first batch that a model keeps documents in one row apart.

Not every model follows position ids or cu_seq_lens, and a configuration doesn't tell. So the model is tried: a change
of the first of two documents in one row must not change the logits of the second.

Shapes: T tokens of a document of the check, V vocabulary.
"""

import torch
from torch import Tensor, nn

from dft.batching.collators import boundary_arguments
from dft.errors import UserError

LENGTH = 8  # tokens of each document of the check
# A change of the logits counts as a leak above this share of the change that the same edit makes within one document.
# Rounding moves logits too, as kernels sum in another order.
LEAK_THRESHOLD = 0.1


class LeakingDocuments(UserError):
    """The model lets documents of one row see each other."""


def needs_check(inputs: dict) -> bool:
    """Whether a batch may hold several documents in a row that only the model can keep apart.

    A mask of more than two dimensions already says which tokens see each other, and a padded row is one document.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim > 2:
        return False
    return "cu_seq_lens_q" in inputs or ("position_ids" in inputs and mask is None)


@torch.no_grad()
def check_isolation(model: nn.Module, inputs: dict, vocab_size: int) -> bool:
    """Changes the first of two documents in one row; the logits of the second must not change.

    Compared with the change when both form one document. The model, which may be wrapped, is called four times; all
    ranks must call this together.

    Args:
        inputs: a batch; the check passes the arguments that it holds.

    Returns:
        Whether the check was conclusive. It isn't for a model whose logits are NaN or don't depend on earlier tokens.

    Raises:
        LeakingDocuments: the logits of the second document changed.
    """
    device = inputs["input_ids"].device
    ids = torch.arange(3 * LENGTH, device=device) % vocab_size
    first, other_first, second = ids.split(LENGTH)
    were_training = [(module, module.training) for module in model.modules()]  # an engine's may not be its model's
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # compiling for so short a row would take far longer than it saves
        apart, joined = (
            [
                _logits_of_last(model, torch.cat([start, second])[None], lengths, inputs)
                for start in (first, other_first)
            ]
            for lengths in ([LENGTH, LENGTH], [2 * LENGTH])
        )
    for module, was_training in were_training:
        module.training = was_training
    change_apart, change_joined = ((a - b).abs().max().item() for a, b in (apart, joined))
    if change_apart > LEAK_THRESHOLD * change_joined:
        raise LeakingDocuments(
            "documents of one row see each other with this model and attention implementation "
            f"(a change of one moves the logits of the next by {change_apart:.2g}, and by {change_joined:.2g} if they "
            "are one): use --batching padded"
        )
    return 0 < change_joined < float("inf")


def _logits_of_last(model: nn.Module, ids: Tensor, lengths: list[int], inputs: dict) -> Tensor:
    """The logits, float32 [T, V], of the last T tokens of a row `ids` that holds documents of these lengths.

    The model gets the same kinds of arguments as with a real batch `inputs`, because wrapped and compiled models may
    depend on them.
    """
    arguments = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "attention_mask": torch.ones_like(ids),
        **boundary_arguments(lengths),
        "use_cache": False,
    }
    arguments = {
        key: value.to(ids.device) if isinstance(value, Tensor) else value
        for key, value in arguments.items()
        if key in inputs
    }
    return model(**arguments).logits[0, -LENGTH:].float()


class LeakCheck:
    """Runs check_isolation on the first batch that needs it, and again until one check was conclusive.

    Args:
        vocab_size: of the model.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._is_done = False

    def __call__(self, model: nn.Module, inputs: dict) -> None:
        """Checks the model with the kinds of arguments of a batch; all ranks must call it together.

        Raises:
            LeakingDocuments: documents of one row see each other.
        """
        if not self._is_done and needs_check(inputs):
            self._is_done = check_isolation(model, inputs, self._vocab_size)
