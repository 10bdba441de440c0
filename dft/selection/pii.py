"""Personal data and credentials in a row: found by their form, and by their check digits where they have some.

What is found is what has a known form. A name, an address or a number without one is not found, and a number that
happens to have the form is: a person must look at what matters.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator

LITERAL = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"(\s*:)?')  # a string of JSON; with the colon if it is a key
# the same, or a number, which has no group
STRING_OR_NUMBER = re.compile(LITERAL.pattern + r"|-?\d[\d.eE+-]*+")
SEPARATORS = re.compile(r"[ -]")
DIGITS = tuple("0123456789")

PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]{1,40}-----|\Z)", re.DOTALL
)
API_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"sk-(?:proj-|ant-|or-)?[A-Za-z0-9_-]{20,200}"  # OpenAI, Anthropic and others
    r"|hf_[A-Za-z0-9]{30,60}"  # Hugging Face
    r"|gh[opsur]_[A-Za-z0-9]{36,80}|github_pat_[A-Za-z0-9_]{22,100}|glpat-[A-Za-z0-9_-]{20,60}"  # GitHub, GitLab
    r"|A(?:KIA|SIA)[A-Z0-9]{16}"  # AWS
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,100}"  # Slack
    r"|[rs]k_live_[A-Za-z0-9]{24,100}"  # Stripe
    r"|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{16,1000}"  # JSON Web Token
    r")(?![A-Za-z0-9_-])"
)
MAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9-])"
)
IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
CARD = re.compile(
    r"(?<![\w.+-])(?<!\d )(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|3\d{3}([ -])\d{6}\2\d{5})"
    r"(?![\w-]|[ .]\d)"
)
CARD_PREFIX = re.compile(r"3[0-9]|4|5[0-9]|6[0-9]|2[2-7]")  # of the networks of payment cards
PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # international
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4}"  # North America
    r"|1[3-9]\d{9}|1[3-9]\d([ -])\d{4}\2\d{4}"  # mobile phones of China
    r")(?![\w-]|\.\d)"
)


def has_luhn_digit(number: str) -> bool:
    """Whether the last digit of a number is its check digit by Luhn's formula (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(number)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether a text of 15 to 34 capital letters and digits has the check digits of an IBAN (ISO 13616, modulo 97)."""
    if not 15 <= len(text) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def _is_card(text: str) -> bool:
    digits = SEPARATORS.sub("", text)
    return CARD_PREFIX.match(digits) is not None and has_luhn_digit(digits)


def _is_phone(text: str) -> bool:
    return 8 <= sum(character.isdigit() for character in text) <= 15


def _iban_in(text: str) -> str:
    """The longest beginning of a text, up to a space, that is an IBAN; "" if there is none: words may follow it."""
    ends = [len(text), *(i for i in range(len(text) - 1, 0, -1) if text[i] == " ")]
    return next((text[:end] for end in ends if is_iban(text[:end].replace(" ", ""))), "")


def _whole(is_valid: Callable[[str], bool]) -> Callable[[str], str]:
    return lambda text: text if is_valid(text) else ""


# Of which a text of that kind has one: most texts have none, and are then not searched
MARKS: dict[str, tuple[str, ...]] = {
    "private_key": ("PRIVATE KEY",),
    "api_key": ("sk-", "hf_", "gh", "glpat-", "AKIA", "ASIA", "AIza", "xox", "k_live_", "eyJ"),
    "mail": ("@",),
    **dict.fromkeys(("iban", "card", "phone"), DIGITS),
}
# kind -> pattern, and the beginning of a match that is of this kind, "" for none; in the order they are looked for
KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], str]]] = {
    "private_key": (PRIVATE_KEY, _whole(lambda _: True)),
    "api_key": (API_KEY, _whole(lambda text: len(set(text)) > 8)),  # not a placeholder such as sk-xxxx
    "mail": (MAIL, _whole(lambda _: True)),
    "iban": (IBAN, _iban_in),
    "card": (CARD, _whole(_is_card)),
    "phone": (PHONE, _whole(_is_phone)),
}


def mask_text(text: str) -> tuple[str, Counter[str]]:
    """A text with what is found replaced by its kind, such as [MAIL], and {kind: how many}."""
    found: Counter[str] = Counter()
    for kind, (pattern, part) in KINDS.items():
        if not any(mark in text for mark in MARKS[kind]):
            continue

        def replace(match: re.Match[str], kind: str = kind, part: Callable[[str], str] = part) -> str:
            own = part(match[0])
            found[kind] += bool(own)
            return f"[{kind.upper()}]{match[0][len(own) :]}" if own else match[0]

        text = pattern.sub(replace, text)
    return text, +found


def mask_json(text: str, with_numbers: bool = False) -> tuple[str, Counter[str]]:
    """As mask_text, in the strings of a JSON value; keys and all else stay as they are.

    A string that holds JSON itself, such as the arguments of a tool call, is masked in the same way, and so are its
    numbers, which are what somebody wrote: it stays JSON.

    Args:
        with_numbers: a number in which something is found becomes a string.
    """
    found: Counter[str] = Counter()
    parts, end = [], 0
    for start, stop in _values(text, STRING_OR_NUMBER if with_numbers else LITERAL):
        value = json.loads(text[start:stop]) if text[start] == '"' else text[start:stop]
        masked, own = mask_json(value, with_numbers=True) if _is_json(value) else mask_text(value)
        if own:
            found += own
            parts += [text[end:start], json.dumps(masked, ensure_ascii=False)]
            end = stop
    return "".join([*parts, text[end:]]), found


def _values(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Where the strings of a JSON text are that are not keys, and its numbers if the pattern finds these."""
    for match in pattern.finditer(text):
        if match[1] is None:
            yield match.span()


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or array."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
