"""The one exception for mistakes that the person at the terminal can mend, and the exit codes."""

# Of a rank, beside 0 (done) and 1 (a failure of ours). `m6 train` ends with the same, but for LOST_PEER.
MISTAKE = 2  # that the user can mend
LOST_PEER = 3  # another rank is gone, which knows more
LEFT = 75  # asked to leave, the state saved: EX_TEMPFAIL of sysexits.h, "try again later"


class UserError(Exception):
    """A wrong setting or input; the message is one line: the thing, its value, and the way out."""
