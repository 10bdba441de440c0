"""Keep tokens, keys and passwords out of what is printed, logged and saved."""

import re

HIDDEN = "HIDDEN"
SECRET_NAME = re.compile(r"(^|[_-])(token|key|secret|password|passwd)$|password|secret", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of that name, such as --hub_token, holds what nobody else may read."""
    return SECRET_NAME.search(name) is not None


def without_secrets(words: list[str]) -> list[str]:
    """The words of a command line, with the values of secret flags hidden."""
    shown, hides_next = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        names_secret = name.startswith("--") and is_secret(name)
        shown.append(HIDDEN if hides_next else f"{name}={HIDDEN}" if names_secret and equals else word)
        hides_next = names_secret and not equals
    return shown
