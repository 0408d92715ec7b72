"""The error of a user's input: the command line prints it as one sentence and exits with status 2."""


class InputError(ValueError):
    """What was given cannot be used; the message says what it was, what was needed and what to do."""
