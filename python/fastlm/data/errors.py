"""The error of a user's input: the command line prints it as one sentence and exits with status 2."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk that fills says


class InputError(ValueError):
    """What was given cannot be used; the message says what it was, what was needed and what to do."""
