"""The one exception for mistakes that the person at the terminal can mend."""


class UserError(Exception):
    """A wrong setting or input; the message is one line: the thing, its value, and the way out."""
