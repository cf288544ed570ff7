"""Errors that the user can fix. Any other exception is a bug in this package."""

import re
from contextlib import contextmanager

# A setting outside a command: `--shots`, but not the one in `mmft-hf finetune --shots 4`. A command ends with its sentence.
_COMMAND_OR_SETTING = re.compile(r"(?:mmft-hf|accelerate launch) .*?(?:[.;] |\)|$)|(?<![\w-])--(?=[a-z]\w)", re.DOTALL)


def in_python(message: str) -> str:
    """Spells the settings in a message as Python users type them: `--shots` becomes `shots`. Commands stay as they are."""
    return _COMMAND_OR_SETTING.sub(lambda found: "" if found[0] == "--" else found[0], message)


_dashes = False  # whether messages are for the command line


@contextmanager
def command_line_spelling():
    """Within it, messages keep the dashes of settings. Processes that are forked within it do the same."""
    global _dashes
    before, _dashes = _dashes, True
    try:
        yield
    finally:
        _dashes = before


class _Message:
    def __str__(self) -> str:
        message = super().__str__()
        return message if _dashes else in_python(message)


class UserError(_Message, ValueError):
    """The user must change something: a bad argument, bad data, a missing key. The command line exits with 2.

    The message says what was expected, what was found and what to type. It is written with the dashes of the command line
    (`--shots`), which `str(error)` leaves out for Python users.
    """


class PartialResult(_Message, Exception):
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
