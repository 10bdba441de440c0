"""Records of one row: as it stands in a file, as a conversation, as a rejection; and the error of a bad row."""

from dataclasses import dataclass
from typing import Any

from dft.printable import printable


@dataclass
class RawRow:
    """One row as it stands in its file, not yet checked.

    A row of JSON has its `text`, not yet parsed; a row of Parquet has its `value`.
    """

    line: int  # where the row starts, from 1; in Parquet the number of the row
    text: str
    value: Any = None
    reason: str | None = None  # why this row, and perhaps the rest of the file, can't be read
    detail: str = ""


@dataclass
class Conversation:
    """One valid row: messages of role and content (text), and what a chat template may ask for beside them.

    An assistant message may have a `weight`, a number of at least 0 that its loss is multiplied by.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    template_kwargs: dict[str, Any] | None
    path: str
    line: int  # where the row starts, from 1
    row: str  # its text, as it stands in the file
    channel: str = ""  # the source that the row's own field `channel` names; "" for none

    def up_to_last_answer(self) -> list[dict[str, Any]]:
        """The messages up to the assistant's last one, which there must be."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return self.messages[: last + 1]


@dataclass
class RejectedRow:
    """One row that is not trained on."""

    path: str
    line: int
    reason: str  # a short name to count by
    detail: str  # what is wrong, for people
    row: str  # its text, as it stands in the file
    is_malformed: bool  # True: the row is broken; False: it is valid, but nothing can be learned from it

    def __str__(self) -> str:
        return f"{printable(self.path)}:{self.line}: {self.detail}"


class RowError(Exception):
    """A row that can't be trained on.

    Args:
        reason: a short name to count by.
        detail: what is wrong, for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def malformed(detail: str) -> RowError:
    """The error of a row that is JSON and breaks the rules of its format."""
    return RowError("malformed_row", detail)
