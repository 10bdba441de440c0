"""Whether a model fits the data: a row of its embedding for every token, and a position for every token of a row."""

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from dft.constants import PADDED_TO
from dft.data.prepared import PreparedData
from dft.errors import UserError

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 5
TABLE_OFFSET = 3  # rows that a table of positions may have more than its limit: OPT's has 2
GROWING_TABLES = ("xglm",)  # model types whose table of positions is computed, and grows with the row
# how configurations without `rope_parameters`, such as those of remote code, say that positions are rotations
ROTARY_KEYS = ("rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base")


def check_fit(
    data: PreparedData, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, is_padded: bool, grows: bool
) -> None:
    """Checks a model against the rows to train and to evaluate on, before its weights are loaded.

    Args:
        is_padded: whether batches are padded.
        grows: whether the embedding gets a row for every token of the tokenizer.

    Raises:
        UserError: the model has no row for a token, or no position for the longest row.
    """
    if not grows:
        check_vocabulary(config, tokenizer, data.ids_from, is_padded)
    check_positions(config, data.longest, is_padded)


# ---- tokens -------------------------------------------------------------------------------------


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that an embedding needs for all tokens: more than their number, where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    ids_from: Callable[[int], Iterable[int]],
    is_padded: bool,
) -> None:
    """Checks that the model's embedding has a row for every token of the data.

    Args:
        ids_from: returns the ids, from a number on, that occur in the rows. It isn't called where the tokenizer has
            no such ids.
        is_padded: whether the tokenizer's padding token stands in the batches.

    Raises:
        UserError: tokens without a row occur.
    """
    size = config.get_text_config().vocab_size
    surplus = tokenizer_size(tokenizer) - size
    if surplus <= 0:
        return
    ids = set(ids_from(size))
    if is_padded and tokenizer.pad_token_id >= size:
        ids.add(tokenizer.pad_token_id)
    if not ids:
        logger.info("The tokenizer has %d tokens beyond the model's embedding; none occurs in the data", surplus)
        return
    names = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in sorted(ids)[:SHOWN_TOKENS]]
    more = f" and {len(ids) - SHOWN_TOKENS} more" if len(ids) > SHOWN_TOKENS else ""
    raise UserError(
        f"the model's embedding has {size} rows, and the data or its padding holds tokens beyond it: "
        f"{', '.join(names)}{more}. Add rows with --resize_embeddings True, or use the tokenizer and chat template "
        "that the model was trained with"
    )


def ids_in(rows: Sequence[np.ndarray]) -> Callable[[int], set[int]]:
    """What check_vocabulary asks for, of rows in memory: int [T] each."""
    return lambda first: {int(token) for row in rows for token in row[row >= first]}


# ---- positions ----------------------------------------------------------------------------------


def check_positions(config: PretrainedConfig, longest: int, is_padded: bool) -> None:
    """Checks that the model has a position for every token of the longest row.

    Positions restart with each document of a packed row, so that only the lengths of the documents count.

    Args:
        longest: tokens of the longest row.
        is_padded: whether batches are padded, which takes positions too.

    Raises:
        UserError: the model looks its positions up in a table that is too short.
    """
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    if not limit or limit < 0:
        return
    needed = -(-longest // PADDED_TO) * PADDED_TO if is_padded else longest
    if needed > limit and not is_rotary(text_config) and has_position_table(config, limit):
        room = limit // PADDED_TO * PADDED_TO if is_padded else limit
        padded = f", padded to {needed}," if needed > longest else ""
        raise UserError(
            f"the longest row has {longest} tokens{padded} and the model a table of {limit} positions: "
            f"--max_length {room} cuts longer rows"
        )
    limit = max(limit, _scaled_limit(text_config))
    if longest > limit:
        logger.warning(
            "The longest row has %d tokens, and the model was made for %d positions: how well it does beyond them is "
            "not known. --max_length %d cuts longer rows.",
            longest,
            limit,
            limit,
        )


def is_rotary(config: PretrainedConfig) -> bool:
    """Whether a model computes its positions by rotation, which has no end."""
    return bool(getattr(config, "rope_parameters", None)) or any(hasattr(config, key) for key in ROTARY_KEYS)


def _scaled_limit(config: PretrainedConfig) -> int:
    """The positions that a scaled rotation is for, 0 if it isn't scaled; max_position_embeddings may say less."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_layer_types = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = [parameters, *of_layer_types]
    scales = [(kind.get("original_max_position_embeddings") or 0) * (kind.get("factor") or 1) for kind in kinds]
    return int(max(scales))


def has_position_table(config: PretrainedConfig, limit: int) -> bool:
    """Whether the model of a configuration has a table of about `limit` positions; False if that can't be told.

    The model is built without memory for its weights.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in GROWING_TABLES:
        return False
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config))
    vocabulary = model.get_input_embeddings()
    learned = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not vocabulary]
    computed = [len(buffer) for buffer in model.buffers() if buffer.ndim == 2]
    return any(0 <= size - limit <= TABLE_OFFSET for size in (*learned, *computed))
