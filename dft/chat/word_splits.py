"""Whether splitting at single spaces preserves token ids, which follows from a tokenizer's regular expressions.

Byte-level tokenizers split text by regular expressions before they look at any vocabulary. Nearly all of these
never match across a space: a space begins a match (" word") or is a part of white space. Then each side of " " in
"one two" becomes the same tokens alone as together, and the tokens of " two" can be cached.

Why this holds, for a space between two characters that are not white space. Nothing matches across it: a match
that has it starts there, or is white space altogether. So the text before it ends a match or is in no match, and
since some expression always matches a space, a match starts there. No expression looks around, except
`\\s+(?!\\S)`, which matters only where white space is longer than one space. So the matches on each side don't
depend on the other side. The same holds for each of several expressions in a sequence.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer

# A piece is a leading space, if there is one, and text without a single space between two words.
PIECE = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+\S*)*")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into ByteLevel
# An expression may consist of these parts; with other parts, texts are not split.
PROPERTY = r"\\p\{(?:[LMNPS][a-z]?|Han|Hiragana|Katakana|Hangul|Latin)\}"  # white space has none of these
CLASS_ITEM = re.compile(rf"{PROPERTY}|(?:\\.|[^\\])-(?:\\.|[^\\])|\\.|[^\\]", re.DOTALL)
PART = re.compile(
    rf"""
      (?P<no_more>\(\?!\\S\))
    | (?P<open>\((?:\?i?:)?)
    | (?P<close>\))
    | (?P<or>\|)
    | (?P<atom>\[(?:{PROPERTY}|\\.|[^\\\[\]&]|&(?!&))+\] | {PROPERTY} | \\. | [^\\\[\](){{}}|?*+.^$])
    """,
    re.VERBOSE | re.DOTALL,
)
WHITE_SPACE_BRANCHES = [[(r"\s", times)] for times in ("", "+", "++")]
QUANTIFIER = re.compile(r"(?:[?*+]|\{\d+(?:,\d*)?\})?[?+]?")

Atom = tuple[str, str]  # what an expression matches at one place, and how often


def split_at_spaces(text: str) -> list[str]:
    """Splits a text before every single space between two words."""
    return PIECE.findall(text)


def can_split_at_spaces(backend: Tokenizer) -> bool:
    """Whether the pieces of `split_at_spaces` have the token ids that they have within the text.

    True only where that follows from the tokenizer's parts; False for others, where it may hold too.
    """
    state = json.loads(backend.to_str(pretty=False))
    if state["model"]["type"] != "BPE" or state["model"]["dropout"] or not _keeps_spaces(state["normalizer"]):
        return False
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or " " in token["content"]:
            return False
    expressions = _expressions(state["pre_tokenizer"] or {})
    if expressions is None or not all(map(is_safe, expressions)):
        return False
    return any(branch in WHITE_SPACE_BRANCHES for expression in expressions for branch in _branches(expression))


def _keeps_spaces(normalizer: dict[str, Any] | None) -> bool:
    """Whether a normalizer changes no space: NFC joins no character to a space and makes none."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(map(_keeps_spaces, normalizer["normalizers"]))


def _expressions(pre_tokenizer: dict[str, Any]) -> list[str] | None:
    """The expressions that a byte-level pre-tokenizer splits by, in order; None if it has steps of another kind."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not steps or steps[-1].get("type") != "ByteLevel":
        return None
    expressions: list[str] = []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"] and step is steps[-1]:
            expressions += [GPT2] if step["use_regex"] else []
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            expressions.append(step["pattern"].get("Regex", "."))
        elif step.get("type") != "Digits":
            return None
    return expressions


# ---- regular expressions ------------------------------------------------------------------------


def _branches(expression: str) -> list[list[Atom]]:
    """The alternatives of an expression, each as the atoms that it matches one after the other.

    Atoms inside a group get the quantifier "in a group", the lookahead `(?!\\S)` gets "no more".

    Raises:
        ValueError: the expression has parts of another kind.
    """
    branches: list[list[Atom]] = [[]]
    position = depth = 0
    while position < len(expression):
        part = PART.match(expression, position)
        if part is None:
            raise ValueError(f"a part of another kind at {expression[position:]!r}")
        quantifier = QUANTIFIER.match(expression, part.end())[0] if part["atom"] or part["close"] else ""
        position = part.end() + len(quantifier)
        if part["atom"]:
            branches[-1].append((part["atom"], "in a group" if depth else quantifier))
        elif part["no_more"]:
            branches[-1].append((part["no_more"], "no more"))
        elif part["or"] and depth == 0:
            branches.append([])
        depth += bool(part["open"]) - bool(part["close"])
    return branches


def is_safe(expression: str) -> bool:
    """Whether a space between two words can only be the first character of a match, and nothing looks around."""
    try:
        return all(map(_is_safe_branch, _branches(expression)))
    except ValueError:
        return False


def _is_safe_branch(branch: list[Atom]) -> bool:
    atoms = [(atom, times) for atom, times in branch if times != "no more"]
    if atoms and all(times != "in a group" and _matches(atom)[1] for atom, times in atoms):
        return all(times != "no more" for _, times in branch[:-1])  # white space alone, perhaps with a lookahead
    if not atoms or len(atoms) < len(branch):
        return False
    return not any(
        _matches(atom)[0] and (i > 0 or times not in ("", "?", "?+")) for i, (atom, times) in enumerate(atoms)
    )


def _matches(atom: str) -> tuple[bool, bool]:
    """Whether an atom can match a space, and whether it matches nothing but white space.

    Raises:
        ValueError: the atom is of an unknown kind.
    """
    if atom.startswith("["):
        is_negated = atom.startswith("[^")
        items = [_matches(item) for item in CLASS_ITEM.findall(atom[1 + is_negated : -1])]
        has_space = any(space for space, _ in items)
        return (not has_space, False) if is_negated else (has_space, all(white for _, white in items))
    if re.fullmatch(PROPERTY, atom):
        return False, False
    if len(atom) > 2:
        if len(atom) > 3 or "\\" in atom:
            raise ValueError(f"the range {atom} is not known")
        return atom[0] <= " " <= atom[2], False
    if atom == r"\s":
        return True, True
    if atom in (r"\n", r"\r", r"\t"):
        return False, True
    if atom in (r"\d", r"\w", r"\S"):
        return False, False
    if atom.startswith("\\") and (atom[1].isalnum() or atom[1].isspace()):
        raise ValueError(f"{atom} is not known")
    return atom == " ", atom.isspace()
