"""The one exception that means "you can mend this"."""


class UserError(Exception):
    """Something the user can mend; its text is one line that says what is wrong and what to change.

    The command-line programs print it without a traceback and exit with code 2. (It is no ValueError: the libraries
    that fill dataclasses from options and YAML catch those and wrap them in many lines.)
    """


class StoppedEarly(Exception):
    """The work was stopped in order before its end, and the same command goes on with it.

    The command-line programs print it and exit with code 75, "try again later".
    """
