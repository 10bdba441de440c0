"""The one kind of exception whose message is all that a user sees."""


class UserError(ValueError):
    """A mistake that the user can mend. The message says what was given, what is allowed and what to do."""


class SharedUserError(UserError):
    """A UserError that all ranks raise together, so that no rank has to be told of it."""
