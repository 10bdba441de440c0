"""What is remarkable in rows that are trained on: names by which the data report counts it, and sentences."""

TURN_WITHOUT_THINKING = "turns_without_thinking"  # the template leaves the thinking of a supervised turn out
EMPTY_TURN = "empty_turns"  # of a supervised turn only the end is learned
TOOLS_NOT_SHOWN = "tools_not_shown"  # the template shows none of the row's tools
TYPED_TAGS = "tags_in_text"  # a user, system or tool text has <think> or the like, which is a token
SYSTEM_IN_LAST_QUESTION = "system_in_last_question"  # as at inference, where the template shows it only there
UNREAD_KEY = "unread_key:"  # and the key of a message that neither the trainer nor the template reads

SENTENCES = {
    TURN_WITHOUT_THINKING: "the chat template leaves out the thinking of {} supervised turns: it isn't learned",
    EMPTY_TURN: "{} supervised turns say nothing, so only their end is learned (--empty_turns skip_turn or drop_row)",
    TOOLS_NOT_SHOWN: "the chat template shows none of the tools of {} rows",
    TYPED_TAGS: "tags such as <think> or <tool_call> stand in user, system or tool texts of {} rows: they stay tokens",
    SYSTEM_IN_LAST_QUESTION: "the chat template shows the system message of {} rows in their last question alone",
}


def describe_remark(name: str, count: int) -> str:
    """A sentence for people."""
    if name.startswith(UNREAD_KEY):
        key = name.removeprefix(UNREAD_KEY)
        return f"neither the trainer nor the chat template reads the key {key!r:.60} of messages, in {count:,} rows"
    return SENTENCES[name].format(f"{count:,}")
