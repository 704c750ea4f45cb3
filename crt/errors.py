"""The exception for mistakes that a user can fix."""


class UserError(Exception):
    """Bad input: its message is one line naming the file, key or value, and the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


class LocalError(UserError):
    """One that a single process of several meets, such as a damaged image: it is the only one that can report it."""
