"""A model's tokenizer, made ready for chats."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dft.errors import UserError

# what libraries raise for files that are missing, broken, or of something else
ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError)
PROBE = "Is anything there?"


def load_tokenizer(name: str, what: str, **source: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, padding on the right, with a padding token.

    Args:
        name: a directory, or a name on the hub.
        what: how errors call it.
        source: revision and the like, for from_pretrained.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except ERRORS as error:
        raise UserError(f"{what}: its tokenizer can't be loaded: {error}") from error
    # transformers makes an empty one where there are no files of a tokenizer
    if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
        raise UserError(f"{what}: there are no files of a tokenizer; copy them from the base model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer
