"""The exceptions whose message is all that a user sees."""


class UserError(ValueError):
    """A mistake that the user can mend. The message says what was given, what is allowed and what to do."""


class SharedUserError(UserError):
    """A UserError that all ranks raise together, so that no rank has to be told of it."""


class StoppedEarly(Exception):
    """A run that was ended on request, on all ranks together; its message is for the user.

    Attributes:
        status: the exit status of the program.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class RankLost(Exception):
    """A training that can't go on because another process has gone; its message is for the user."""
