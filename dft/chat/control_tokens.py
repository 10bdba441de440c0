"""Control tokens of a tokenizer, and marks around those that a conversation has in its own text.

A control token in the text of a message must stay plain text: it must end no turn and become no token. So it is
wrapped in two private-use characters before the template is rendered; without marks, it is the template's.
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from dft.reading.rows import RowError

MARK_START, MARK_END = "\ue0f0", "\ue0f1"
MARKS = re.compile(f"[{MARK_START}{MARK_END}]")
# Tags that stand inside turns, which assistants may write in their own text, so they are not marked
CONTENT_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning|answer|(?:tool|function)s?(?:_\w+)?|arg_\w+)>")
SIGN = re.compile(r"\w[^\w\s]|[^\w\s]\w")  # words alone and signs alone are text, whatever writes them
RESERVED_CHARACTERS = tuple(map(chr, range(0xE0F0, 0xE0F6)))  # marks, and what anchors.py and text_encoder.py write


class ControlTokens:
    """The control tokens that a template may write, and patterns for them.

    Args:
        written: the source of the template and texts that it renders.

    Attributes:
        ids: the tokenizer's control tokens, {text: id}: those marked as special, and all others that the template
            writes, such as DeepSeek's role tokens. CONTENT_TAGS are none.
        unmarked: matches a control token of the template.
        trailing: matches one at the end of a text, with white space after it; group 1 is the token.
        tags: matches those of CONTENT_TAGS that are tokens of this tokenizer; None if none is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str = ""):
        added = tokenizer.added_tokens_decoder
        plain = {token.content for token in added.values() if not token.special}
        tags = {name for name in plain if CONTENT_TAGS.fullmatch(name)}
        others = {name for name in plain if SIGN.search(name)} - tags
        in_template = {match[0] for match in re.finditer(one_of(others), written)}
        self.ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token.special or token.content in in_template
        }
        self.tags = re.compile(one_of(tags)) if tags else None
        token = one_of({*self.ids, tokenizer.eos_token or "<|im_end|>", "<|im_start|>", "<|im_end|>"})
        self.unmarked = re.compile(rf"(?<!{MARK_START})(?:{token})")
        self.trailing = re.compile(rf"(?<!{MARK_START})({token})\s*\Z")
        self._token = re.compile(token)

    def mark(self, value: Any) -> Any:
        """A JSON value with every control token in its texts marked, in the keys of objects too.

        Raises:
            RowError: a text has one of the characters that serve as marks.
        """
        if isinstance(value, str):
            if not value.isascii() and any(character in value for character in RESERVED_CHARACTERS):
                raise RowError("private_use_character", "the text holds U+E0F0 to U+E0F5, which are used inside")
            if self._token.search(value) is None:
                return value
            return self._token.sub(lambda match: f"{MARK_START}{match[0]}{MARK_END}", value)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value


def one_of(words: Iterable[str]) -> str:
    """A regular expression for any of the words, the longest first.

    Words with a common beginning share it, so a search doesn't try hundreds of words at each character.
    """
    words = set(words)
    if not words:
        return r"(?!)"
    endings: dict[str, list[str]] = {}
    for word in sorted(words - {""}):
        endings.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + one_of(rest) for first, rest in endings.items()]
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""
    return f"(?:{pattern})?" if branches and "" in words else pattern
