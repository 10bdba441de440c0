"""The language of a row, by py3langid: offline, and with a model of 139 languages in the package.

It was chosen by a measurement on 60 sentences of 15 languages and 1,500 English rows: py3langid and lingua knew all of
the sentences, langdetect 59; lingua takes a gigabyte of memory, langdetect a tenth of the speed. pycld2 knew them too
and is nine times faster, and has to be compiled on many machines.
"""

from collections.abc import Callable
from functools import cache

from dft.errors import UserError
from dft.selection.extra import missing_package

MAX_CHARACTERS = 2000  # of a row that its language is told by
MIN_LETTERS = 10  # a text of fewer has no language that could be told


@cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise missing_package("clean --languages", "py3langid") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages: tuple[str, ...]) -> None:
    """Checks the codes of languages.

    Raises:
        UserError: one isn't known, or py3langid isn't installed.
    """
    known = sorted(set(_identifier().nb_classes))
    unknown = [code for code in languages if code not in known]
    if unknown:
        raise UserError(f"--languages {unknown[0]}: not a code that is known, give some of {', '.join(known)}")


def language_teller() -> Callable[[str], tuple[str, float] | None]:
    """A function that gives the code of a text's language and its probability; None for too few letters."""
    identifier = _identifier()

    def tell(text: str) -> tuple[str, float] | None:
        start = text[:MAX_CHARACTERS]
        if sum(map(str.isalpha, start)) < MIN_LETTERS:
            return None
        code, probability = identifier.classify(start)
        return str(code), float(probability)

    return tell
