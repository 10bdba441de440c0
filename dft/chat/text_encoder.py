"""Tokenize rendered conversations quickly: in segments between control tokens, each tokenized once.

A tokenizer splits its input at control tokens before it does anything else, so the segments between them are
tokenized independently. Here the splits are made first. Segments that were seen lately (system prompts, tool
schemas) are not tokenized again, nor are words, where they are independent too (word_encoder.py). Character
offsets, which are slow, are only asked for where a turn may start in the middle of a token.

Control tokens of a conversation's own text are marked, see control_tokens.py. They never become tokens; the marks
themselves have no token.
"""

import copy
import json
import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dft.chat.control_tokens import MARK_START, MARKS, one_of
from dft.chat.word_encoder import WordEncoder, encode_batch
from dft.chat.word_splits import can_split_at_spaces

NO_NORMALIZER = {"type": "Sequence", "normalizers": []}  # DeepSeek's
MAX_CACHED_CHARACTERS = 4_000_000
# The tokenizers library takes these for white space; str.strip also takes U+001C to U+001F.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
AT_START = "\ue0f5"  # marks the segment that begins a text: some tokenizers put a space there
PROBE = "{0}a b\n{1} c\n\n{0}{1}  d{0} \n e é中 {1}"  # it has every kind of split that rendered texts have

Segment = str | int  # a text, or the id of a control token
Border = tuple[int, str | None]  # a segment's index, and the part of the segment before the border, if there is one


class TextEncoder:
    """Tokenizes rendered texts as `tokenizer` does, with unmarked control tokens alone as control tokens.

    Args:
        tokenizer: a fast tokenizer. What it adds to a text by itself (BOS) is left out: templates write it.
        control: its control tokens, {text: id}, see ControlTokens.

    Attributes:
        control: the same.
        can_segment: whether this tokenizer's segments are independent. If not, whole texts are tokenized, and
            texts with marks can't be encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: dict[str, int]):
        self.control = control
        names = one_of(control)
        self._split = re.compile(f"({names})")
        self._split_unmarked = re.compile(f"(?<!{MARK_START})({names})")  # slower: the lookbehind costs time
        self._control_ids = np.array(sorted(control.values()), dtype=np.int32)
        # these control tokens take the white space beside them
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content in control]
        self._strips_before = {token.content for token in added if token.lstrip}
        self._strips_after = {token.content for token in added if token.rstrip}
        self._backend, self._backend_at_start = _backends(_as_special(tokenizer.backend_tokenizer, control))
        self._cache: dict[str, np.ndarray] = {}  # segment -> ids, int32 [T]
        self._cached_characters = 0
        self._words = WordEncoder(self._backend) if can_split_at_spaces(self._backend) else None
        self.can_segment = True
        self.can_segment = _splits_at_control_tokens(tokenizer, control) and self._agrees_with_whole_text()

    def _agrees_with_whole_text(self) -> bool:
        names = list(self.control)
        pairs = zip(names, names[1:] + names[:1], strict=True)
        texts = [PROBE.format(*pair) for pair in pairs] + ["a b\n c", " a"]
        return all(np.array_equal(self.encode([t], [[]])[0][0], self._encode_whole(t, [])[0]) for t in texts)

    def encode(self, texts: list[str], borders: list[list[int]]) -> list[tuple[np.ndarray, list[int]] | None]:
        """Token ids of texts, and the tokens at given characters.

        Args:
            texts: rendered texts, with marks.
            borders: for each text, positions of characters.

        Returns:
            for each text, its ids, int32 [T], and for each border the first token that starts there or
            after it; None where its marked control tokens can't be kept as plain text.
        """
        for backend in (self._backend, self._backend_at_start):
            backend.no_truncation()
            backend.no_padding()
        pairs = list(zip(texts, borders, strict=True))
        if not self.can_segment:
            return [None if MARK_START in text else self._encode_whole(text, places) for text, places in pairs]
        rows = [self._segment(text, places) for text, places in pairs]
        self._tokenize(segment for segments, _ in rows for segment in segments if isinstance(segment, str))
        self._tokenize(before for _, found in rows for _, before in found if before is not None)
        results = [self._join(segments, found) for segments, found in rows]
        if self._cached_characters > MAX_CACHED_CHARACTERS:
            self._cache.clear()
            self._cached_characters = 0
        return results

    # ---- in segments ----------------------------------------------------------------------------

    def _segment(self, text: str, borders: list[int]) -> tuple[list[Segment], list[Border]]:
        """Splits a text at its control tokens, and locates borders; marks stay in the segments."""
        segments: list[Segment] = []
        starts: list[int] = []  # where each segment starts in the text
        position = text_end = 0
        parts = (self._split_unmarked if MARK_START in text else self._split).split(text)
        for i, part in enumerate(parts):
            start = position
            position += len(part)
            if i % 2:  # re.split puts the control tokens at the odd places
                segments.append(self.control[part])
                starts.append(text_end if part in self._strips_before else start)
                continue
            if i > 0 and parts[i - 1] in self._strips_after:
                stripped = part.lstrip(WHITE_SPACE)
                start += len(part) - len(stripped)
                part = stripped
            if i + 1 < len(parts) and parts[i + 1] in self._strips_before:
                part = part.rstrip(WHITE_SPACE)
            text_end = start + len(part)
            if part:
                segments.append(part if i > 0 else AT_START + part)
                starts.append(start if i > 0 else -len(AT_START))
        return segments, _locate(borders, segments, starts)

    def _tokenize(self, segments: Iterable[str]) -> None:
        """Puts the ids of segments into the cache."""
        missing = {segment for segment in segments if segment not in self._cache}
        marked = {segment for segment in missing if MARK_START in segment}
        at_start = {segment for segment in missing if segment.startswith(AT_START)}
        for group, backend, control_is_text in (
            (missing - marked - at_start, self._backend, False),
            (marked - at_start, self._backend, True),
            (at_start - marked, self._backend_at_start, False),
            (at_start & marked, self._backend_at_start, True),
        ):
            batch = list(group)
            plain = [_plain(segment) for segment in batch]
            if self._words is not None and not control_is_text:
                encoded = self._words.encode(plain)
            else:
                backend.encode_special_tokens = control_is_text
                encoded = encode_batch(backend, plain)
                backend.encode_special_tokens = False
            for segment, ids in zip(batch, encoded, strict=True):
                self._cache[segment] = np.frombuffer(ids, dtype=np.int32)
                self._cached_characters += len(segment)

    def _join(self, segments: list[Segment], borders: list[Border]) -> tuple[np.ndarray, list[int]] | None:
        """The ids of a text and the tokens at its borders; None if a marked control token became a token."""
        parts = [
            self._cache[segment] if isinstance(segment, str) else np.array([segment], dtype=np.int32)
            for segment in segments
        ]
        for segment, ids in zip(segments, parts, strict=True):
            if isinstance(segment, str) and MARK_START in segment and np.isin(ids, self._control_ids).any():
                return None
        ends = np.cumsum([0] + [len(ids) for ids in parts])
        tokens = [
            int(ends[index]) + (0 if before is None else self._tokens_before(segments[index], before))
            for index, before in borders
        ]
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return ids, tokens

    def _tokens_before(self, segment: str, before: str) -> int:
        """How many tokens of a segment start inside its first characters, `before`."""
        ids, ids_before = self._cache[segment], self._cache[before]
        in_white_space = before[-1].isspace() and segment[len(before)].isspace()  # a normalizer may join the two
        if not in_white_space and np.array_equal(ids[: len(ids_before)], ids_before):
            return len(ids_before)  # the same tokens stand for the same text
        backend = self._backend_at_start if segment.startswith(AT_START) else self._backend
        backend.encode_special_tokens = MARK_START in segment
        offsets = backend.encode(_plain(segment), add_special_tokens=False).offsets
        backend.encode_special_tokens = False
        length = len(_plain(before))
        return sum(start < length for start, _ in offsets)

    # ---- whole texts ----------------------------------------------------------------------------

    def _encode_whole(self, text: str, borders: list[int]) -> tuple[np.ndarray, list[int]]:
        self._backend_at_start.encode_special_tokens = False
        encoding = self._backend_at_start.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int32), [int((starts < border).sum()) for border in borders]


def _locate(borders: list[int], segments: list[Segment], starts: list[int]) -> list[Border]:
    """The segment that each border is in, or that starts there.

    Args:
        borders: positions in the text, in characters.
        starts: where each segment starts in the text.
    """
    starts_array = np.array(starts, dtype=np.int64)
    located: list[Border] = []
    for border in borders:
        index = int(np.searchsorted(starts_array, border, side="right")) - 1
        if index < 0 or starts[index] == border:
            located.append((max(index, 0), None))
        elif isinstance(segments[index], int) or border >= starts[index] + len(segments[index]):
            located.append((index + 1, None))
        else:
            located.append((index, segments[index][: border - starts[index]]))
    return located


def _plain(segment: str) -> str:
    """A segment without marks, as it is tokenized."""
    return MARKS.sub("", segment.removeprefix(AT_START))


def _backends(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer for segments inside a text, and the one for the segment at its start."""
    state = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if b'"prepend_scheme":"first"' not in state:
        return backend, backend
    without_space = copy.copy(backend.pre_tokenizer)
    without_space.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
    inside = Tokenizer.from_str(backend.to_str())
    inside.pre_tokenizer = without_space
    return inside, backend


def _as_special(backend: Tokenizer, control: dict[str, int]) -> Tokenizer:
    """The tokenizer with all of its control tokens marked as special, so that it can take them as text."""
    if all(t.special for t in backend.get_added_tokens_decoder().values() if t.content in control):
        return backend
    state = json.loads(backend.to_str(pretty=False))
    for token in state["added_tokens"]:
        token["special"] |= token["content"] in control
    return Tokenizer.from_str(json.dumps(state))


def _splits_at_control_tokens(tokenizer: PreTrainedTokenizerBase, control: dict[str, int]) -> bool:
    """Whether the tokenizer splits at a control token wherever its characters stand."""
    added = tokenizer.added_tokens_decoder.values()
    own = [token for token in added if token.content in control]
    others = [token for token in added if token.content not in control]
    strips = any(token.lstrip or token.rstrip for token in own)
    if strips and any(t.content != t.content.strip() or t.lstrip or t.rstrip for t in others):
        return False  # a control token and another token may claim the same white space
    normalizer = tokenizer.backend_tokenizer.normalizer
    state = NO_NORMALIZER if normalizer is None else json.loads(normalizer.__getstate__())
    for token in own:
        # NFC leaves ASCII alone, but for what a combining character follows
        is_kept = state == NO_NORMALIZER or (state == {"type": "NFC"} and token.content.isascii())
        if token.single_word or (token.normalized and not is_kept):
            return False
    return not any(_overlap(other.content, token.content) for token in own for other in others)


def _overlap(other: str, control: str) -> bool:
    """Whether the token `other` can take characters of a `control` token that starts after it does."""
    if control in other:
        return True
    return any(control.startswith(other[i:]) for i in range(len(other)) if other[i] == control[0])
