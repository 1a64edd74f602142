"""The one exception for mistakes that the person at the terminal can mend, and the exit codes."""

import contextlib
from collections.abc import Iterator

# Of a rank, beside 0 (done) and 1 (a failure of ours). `m6 train` ends with 1 for LOST_PEER and RESTARTABLE.
MISTAKE = 2  # that the user can mend
LOST_PEER = 3  # another rank is gone, which knows more
RESTARTABLE = 4  # told in one line, but another start may mend it
LEFT = 75  # asked to leave, the state saved: EX_TEMPFAIL of sysexits.h, "try again later"


class UserError(Exception):
    """A wrong setting or input; the message is one line: the thing, its value, and the way out."""


class RestartableError(UserError):
    """What broke under a run, and is not there any more, or not the same, when it is started again."""


@contextlib.contextmanager
def told_as_mistake() -> Iterator[None]:
    """What a library here refuses by ValueError is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
