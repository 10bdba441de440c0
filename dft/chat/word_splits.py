"""Where a text can be cut inside a segment: before a single blank that stands between two words.

Byte-level tokenizers cut text with regular expressions before they look at any vocabulary. Nearly all of
these never match across a blank: a blank begins a match (" word") or is a part of white space. Then each
side of " " in "one two" becomes the same tokens alone as together, and the tokens of " two" can be kept
for the next time.

Why this holds, for a blank between two characters that are no white space. Nothing matches across it: a
match that holds it starts there, or is white space altogether. So what stands before it ends a match or
lies in no match, and since some expression always takes a blank, a match starts there. No expression
looks around, but for `\\s+(?!\\S)`, where a run of white space is longer than the one blank. So the matches
on each side don't depend on the other. The same goes for each of several expressions in a sequence.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer

# a piece: a blank if there is one, then text without a single blank between two words
PIECE = re.compile(r"(?: ?\S+|\s+\S*)(?:(?! \S)\s+\S*)*")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
# what an expression may consist of; whoever uses more isn't cut
PROPERTY = r"\\p\{(?:[LMNPS][a-z]?|Han|Hiragana|Katakana|Hangul|Latin)\}"  # no white space has these
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
TAKES_BLANKS = [[(r"\s", times)] for times in ("", "+", "++")]
QUANTIFIER = re.compile(r"(?:[?*+]|\{\d+(?:,\d*)?\})?[?+]?")


def pieces(text: str) -> list[str]:
    """`text` cut before every single blank between two words."""
    return PIECE.findall(text)


def can_cut_at_blanks(backend: Tokenizer) -> bool:
    """Whether the pieces of a text have the tokens that they have within it.

    True only where that follows from the tokenizer's parts; False for others, which may be as good.
    """
    state = json.loads(backend.to_str(pretty=False))
    if state["model"]["type"] != "BPE" or state["model"]["dropout"] or not _is_harmless(state["normalizer"]):
        return False
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or " " in token["content"]:
            return False
    steps = state["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not steps or steps[-1].get("type") != "ByteLevel":
        return False
    expressions: list[str] = []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step["add_prefix_space"] and step is steps[-1]:
            expressions += [GPT2] if step["use_regex"] else []
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            expressions.append(step["pattern"].get("Regex", "."))
        elif step.get("type") != "Digits":
            return False
    if not all(map(keeps_to_words, expressions)):
        return False
    return any(branch in TAKES_BLANKS for expression in expressions for branch in _branches(expression))


def _is_harmless(normalizer: dict[str, Any] | None) -> bool:
    """NFC joins no character to a blank before it or after it, and makes none."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(map(_is_harmless, normalizer["normalizers"]))


# ---- regular expressions ------------------------------------------------------------------------

Atom = tuple[str, str]  # and how often


def _branches(expression: str) -> list[list[Atom]]:
    """The alternatives of an expression, each as what it matches one after the other.

    Atoms inside a group get the number of times "in a group", the look ahead `(?!\\S)` "no more".

    Raises:
        ValueError: the expression has other parts.
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


def keeps_to_words(expression: str) -> bool:
    """Whether a blank between two words can only be the first character of a match, and nothing looks around."""
    try:
        return all(map(_is_branch_of_words, _branches(expression)))
    except ValueError:
        return False


def _is_branch_of_words(branch: list[Atom]) -> bool:
    atoms = [(atom, times) for atom, times in branch if times != "no more"]
    if atoms and all(times != "in a group" and _takes(atom)[1] for atom, times in atoms):
        return all(times != "no more" for _, times in branch[:-1])
    if not atoms or len(atoms) < len(branch):
        return False
    return not any(
        _takes(atom)[0] and (i > 0 or times not in ("", "?", "?+")) for i, (atom, times) in enumerate(atoms)
    )


def _takes(atom: str) -> tuple[bool, bool]:
    """Whether an atom can match a blank, and whether it matches nothing but white space.

    Raises:
        ValueError: a backslash before an unknown letter.
    """
    if atom.startswith("["):
        is_negated = atom.startswith("[^")
        items = [_takes(item) for item in CLASS_ITEM.findall(atom[1 + is_negated : -1])]
        takes_blank = any(blank for blank, _ in items)
        return (not takes_blank, False) if is_negated else (takes_blank, all(white for _, white in items))
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
