"""Add rows to a model's embeddings for tokens that it has none for.

Shapes: V vocabulary, H hidden.
"""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from dft.errors import UserError

logger = logging.getLogger(__name__)


@torch.no_grad()
def add_rows(model: PreTrainedModel, size: int) -> None:
    """Enlarges the input and the output embedding to `size` rows; the new ones are the mean of the old ones.

    A model that has as many rows already is left as it is. Under ZeRO-3 all ranks must call this together:
    transformers gathers the old rows and makes whole parameters of them and the new ones, which DeepSpeed shards when
    training starts. Every rank computes the same mean of the same rows.

    Raises:
        UserError: transformers left an embedding of another size.
    """
    old = model.config.get_text_config().vocab_size
    if old >= size:
        logger.info("--resize_embeddings: the model's embedding has %d rows, enough for all %d ids", old, size)
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    for parameter in _embeddings(model):
        if len(parameter) != size:
            raise UserError(
                f"--resize_embeddings: an embedding has {len(parameter)} rows and not {size} afterwards; resize the "
                f"model beforehand, with transformers' resize_token_embeddings({size}) and save_pretrained"
            )
        parameter[old:] = parameter[:old].mean(0, dtype=torch.float32).to(parameter.dtype)
    logger.info("The embedding got %d rows more, %d in all: each is the mean of the %d before", size - old, size, old)


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights [V, H] of the input and the output embedding, which may be one, and the bias [V] of the output."""
    found = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in () if module is None else module.parameters(recurse=False):
            found[id(parameter)] = parameter
    return list(found.values())
