"""Rendered conversations to token ids, quickly: in segments, each tokenized once.

A tokenizer cuts its input at control tokens before it does anything else, so what stands between two of
them is tokenized by itself. Here the cuts are made first. Segments that were seen lately (system prompts,
tool schemas) are not tokenized again, nor are words, where they are independent too (word_encoder.py). No
character offsets are needed but where a turn starts in the middle of a token.

Control tokens that are a conversation's own text come wrapped in MARK_START and MARK_END. They never
become tokens; the marks themselves have no token.
"""

import copy
import re
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dft.chat.word_encoder import WordEncoder, encode_batch
from dft.chat.word_splits import can_cut_at_blanks

MARK_START, MARK_END = "\ue0f0", "\ue0f1"  # private-use characters
MARKS = re.compile(f"[{MARK_START}{MARK_END}]")
MAX_CACHED_CHARACTERS = 4_000_000
# what the tokenizers library takes for white space; str.strip also takes U+001C to U+001F
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
PROBE = "{0}a b\n{1} c\n\n{0}{1}  d{0} \n e é中 {1}"  # every cut that a render makes, with two control tokens


class TextEncoder:
    """Tokenizes rendered texts as `tokenizer` does, its control tokens being the template's alone.

    Args:
        tokenizer: a fast tokenizer. What it adds to a text by itself (BOS) is left out: templates write it.

    Attributes:
        special: the control tokens, {text: id}.
        can_segment: whether this tokenizer's segments are independent. If not, whole texts are tokenized,
            and those with marks can't be.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        added = tokenizer.added_tokens_decoder
        self.special = {token.content: token_id for token_id, token in added.items() if token.special}
        names = one_of(self.special)
        self._cut = re.compile(f"({names})")
        self._cut_unmarked = re.compile(f"(?<!{MARK_START})({names})")  # a lookbehind makes it much slower
        self._special_ids = np.array(sorted(self.special.values()), dtype=np.int32)
        # white space beside a token that belongs to it
        self._strips_before = {token.content for token in added.values() if token.special and token.lstrip}
        self._strips_after = {token.content for token in added.values() if token.special and token.rstrip}
        self._backend, self._backend_at_start = _backends(tokenizer.backend_tokenizer)
        self._cache: dict[str, np.ndarray] = {}
        self._cached_characters = 0
        self._words = WordEncoder(self._backend) if can_cut_at_blanks(self._backend) else None
        self.can_segment = True
        self.can_segment = _is_cuttable(tokenizer) and self._agrees_with_whole_text()

    def _agrees_with_whole_text(self) -> bool:
        names = list(self.special)
        pairs = zip(names, names[1:] + names[:1], strict=True)
        texts = [PROBE.format(*pair) for pair in pairs] + ["a b\n c", " a"]
        return all(np.array_equal(self.encode([t], [[]])[0][0], self._encode_whole(t, [])[0]) for t in texts)

    def encode(self, texts: list[str], borders: list[list[int]]) -> list[tuple[np.ndarray, list[int]] | None]:
        """Token ids and borders of texts.

        Args:
            texts: rendered texts, with marks.
            borders: for each text, characters.

        Returns:
            for each text, its ids, int32 [T], and for each border the first token that starts there or
            after it; None where its marked control tokens can't be kept as plain text.
        """
        for backend in (self._backend, self._backend_at_start):
            backend.no_truncation()
            backend.no_padding()
        if not self.can_segment:
            return [None if MARK_START in t else self._encode_whole(t, b) for t, b in zip(texts, borders, strict=True)]
        cut = [self._cut_text(text, some) for text, some in zip(texts, borders, strict=True)]
        self._tokenize(segment for segments, _ in cut for segment in segments if isinstance(segment, str))
        self._tokenize(header for _, found in cut for _, header in found if header is not None)
        results = [self._join(segments, found) for segments, found in cut]
        if self._cached_characters > MAX_CACHED_CHARACTERS:
            self._cache.clear()
            self._cached_characters = 0
        return results

    # ---- in segments ----------------------------------------------------------------------------

    def _cut_text(self, text: str, borders: list[int]) -> tuple[list[str | int], list[tuple[int, str | None]]]:
        """Segments (a text, or the id of a control token); and for each border its segment and what of it is before.

        Marks stay in the segments.
        """
        segments: list[str | int] = []
        starts: list[int] = []  # of the segments, in characters
        position = text_end = 0
        parts = (self._cut_unmarked if MARK_START in text else self._cut).split(text)
        for i, part in enumerate(parts):
            start = position
            position += len(part)
            if i % 2:
                segments.append(self.special[part])
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
                segments.append(part if i > 0 else _AT_START + part)
                starts.append(start if i > 0 else -len(_AT_START))
        starts_array = np.array(starts, dtype=np.int64)
        found: list[tuple[int, str | None]] = []
        for border in borders:
            index = int(np.searchsorted(starts_array, border, side="right")) - 1
            if index < 0 or starts[index] == border:
                found.append((max(index, 0), None))
            elif isinstance(segments[index], int) or border >= starts[index] + len(segments[index]):
                found.append((index + 1, None))
            else:
                found.append((index, segments[index][: border - starts[index]]))
        return segments, found

    def _tokenize(self, segments: Iterable[str]) -> None:
        """Puts the ids of segments into the cache."""
        missing = {segment for segment in segments if segment not in self._cache}
        marked = {segment for segment in missing if MARK_START in segment}
        at_start = {segment for segment in missing if segment.startswith(_AT_START)}
        for some, backend, control_is_text in (
            (missing - marked - at_start, self._backend, False),
            (marked - at_start, self._backend, True),
            (at_start - marked, self._backend_at_start, False),
            (at_start & marked, self._backend_at_start, True),
        ):
            batch = list(some)
            plain = [_plain(segment) for segment in batch]
            if self._words is not None and not control_is_text:
                found = self._words.encode(plain)
            else:
                backend.encode_special_tokens = control_is_text
                found = encode_batch(backend, plain)
                backend.encode_special_tokens = False
            for segment, ids in zip(batch, found, strict=True):
                self._cache[segment] = np.frombuffer(ids, dtype=np.int32)
                self._cached_characters += len(segment)

    def _join(
        self, segments: list[str | int], found: list[tuple[int, str | None]]
    ) -> tuple[np.ndarray, list[int]] | None:
        parts = [
            self._cache[segment] if isinstance(segment, str) else np.array([segment], dtype=np.int32)
            for segment in segments
        ]
        for segment, ids in zip(segments, parts, strict=True):
            if isinstance(segment, str) and MARK_START in segment and np.isin(ids, self._special_ids).any():
                return None
        ends = np.cumsum([0] + [len(ids) for ids in parts])
        borders = [
            int(ends[index]) + (0 if header is None else self._tokens_before(segments[index], header))
            for index, header in found
        ]
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        return ids, borders

    def _tokens_before(self, segment: str, header: str) -> int:
        """How many tokens of a segment start inside its first characters, `header`."""
        ids, header_ids = self._cache[segment], self._cache[header]
        in_blanks = header[-1].isspace() and segment[len(header)].isspace()  # which a normalizer may join
        if not in_blanks and np.array_equal(ids[: len(header_ids)], header_ids):
            return len(header_ids)  # the same tokens stand for the same text
        backend = self._backend_at_start if segment.startswith(_AT_START) else self._backend
        backend.encode_special_tokens = MARK_START in segment
        offsets = backend.encode(_plain(segment), add_special_tokens=False).offsets
        backend.encode_special_tokens = False
        return sum(start < len(_plain(header)) for start, _ in offsets)

    # ---- whole ----------------------------------------------------------------------------------

    def _encode_whole(self, text: str, borders: list[int]) -> tuple[np.ndarray, list[int]]:
        self._backend_at_start.encode_special_tokens = False
        encoding = self._backend_at_start.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int32), [int((starts < border).sum()) for border in borders]


def one_of(words: Iterable[str]) -> str:
    """A regular expression for any of the words, the longest where several match; it never tries them one by one."""
    words = set(words)
    if not words:
        return r"(?!)"
    rests: dict[str, list[str]] = {}
    for word in sorted(words - {""}):
        rests.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + one_of(some) for first, some in rests.items()]
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""
    return f"(?:{pattern})?" if branches and "" in words else pattern


_AT_START = "\ue0f5"  # before a segment that begins the text: some tokenizers put a space there


def _plain(segment: str) -> str:
    """A segment as it is tokenized: without marks."""
    return MARKS.sub("", segment.removeprefix(_AT_START))


def _backends(backend: Tokenizer) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizer inside: for a segment in the middle of a text, and for one at its start."""
    state = b"" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__()
    if b'"prepend_scheme":"first"' not in state:
        return backend, backend
    without_space = copy.copy(backend.pre_tokenizer)
    without_space.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
    inside = Tokenizer.from_str(backend.to_str())
    inside.pre_tokenizer = without_space
    return inside, backend


def _is_cuttable(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a control token is one wherever its characters stand."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token for token in added if token.special]
    others = [token.content for token in added if not token.special]
    strips = any(token.lstrip or token.rstrip for token in special)
    if strips and any(t.content != t.content.strip() or t.lstrip or t.rstrip for t in added if not t.special):
        return False  # both want the same white space
    has_normalizer = tokenizer.backend_tokenizer.normalizer is not None
    if any(token.single_word or (token.normalized and has_normalizer) for token in special):
        return False
    return not any(_overlap(other, token.content) for token in special for other in others)


def _overlap(other: str, control: str) -> bool:
    """Whether an occurrence of `other` can take characters of a `control` token that starts after it does."""
    if control in other:
        return True
    return any(control.startswith(other[i:]) for i in range(len(other)) if other[i] == control[0])
