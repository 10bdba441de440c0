"""A model's tokenizer, made ready for chats."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dft.errors import UserError

# what libraries raise for files that are missing, broken, or of something else
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError)
PROBE = "Is anything there?"


def load_tokenizer(name: str, what: str, chat_template: str | None = None, **source: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token.

    Args:
        name: a directory, or a name on the hub.
        what: how errors call it.
        chat_template: a file whose Jinja template replaces the tokenizer's own.
        source: revision and the like, for from_pretrained.

    Raises:
        UserError: there is none, or the file of the template can't be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    except LOADING_ERRORS as error:
        raise UserError(f"{what}: its tokenizer can't be loaded: {error}") from error
    # transformers makes an empty one where there are no files of a tokenizer
    if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
        raise UserError(f"{what}: there are no files of a tokenizer; copy them from the base model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(path: str) -> str:
    """A Jinja chat template from a file.

    Raises:
        UserError: the file can't be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {path} can't be read: {error}") from error


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids of all special tokens: end of turn, end of text, padding, and whatever else is marked as special."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted(added | set(tokenizer.all_special_ids)))
