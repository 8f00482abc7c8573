"""Errors that a user reads: one line that says what is wrong and what to do. Anything else that escapes is a bug."""


class CachefsError(Exception):
    """A failure to be shown as `cachefs: message`, without a traceback."""

    exit_status = 1


class UsageError(CachefsError):
    """An option or argument that can't be meant: the command line itself is wrong."""

    exit_status = 2
