"""Rows that are valid and teach nothing."""

from dft.reading.messages import is_empty
from dft.reading.rows import Conversation, RejectedRow


def reject_untrainable(row: Conversation | RejectedRow) -> Conversation | RejectedRow:
    """The row itself, or its rejection if the assistant says nothing in it."""
    if isinstance(row, RejectedRow):
        return row
    turns = [m for m in row.messages if m["role"] == "assistant"]
    if not turns:
        return reject(row, "no_assistant_turn", "no message of the role assistant")
    if all(map(is_empty, turns)):
        return reject(row, "no_assistant_text", "every assistant message is empty")
    return row


def reject(row: Conversation, reason: str, detail: str) -> RejectedRow:
    """The rejection of a well-formed row that can't be trained on."""
    return RejectedRow(row.path, row.line, reason, detail, row.row, is_malformed=False)
