"""Errors that the user can fix. Any other exception is a bug in this package."""


class UserError(ValueError):
    """The user must change something: a bad argument, bad data, a missing key. The command line exits with 2.

    The message says what was expected, what was found and what to type.
    """


class PartialResult(Exception):
    """The work is done in part. The command line exits with 3.

    Args:
        again: whether the same command continues the work. The command line then prints it. Otherwise the message says what
            to type.
    """

    def __init__(self, message: str, again: bool = False):
        super().__init__(message)
        self.again = again


def nearest(name: str, known) -> str:
    """Returns ` Did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    import difflib

    found = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
