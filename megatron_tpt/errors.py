"""What ends a program with one line in place of a traceback."""


class UserError(Exception):
    """Something the user can mend; its text is one line that says what is wrong and what to change.

    The command-line programs print it without a traceback and exit with code 2. (It is no ValueError: the libraries
    that fill dataclasses from options and YAML catch those and wrap them in many lines.)
    """


class StoppedEarly(Exception):
    """The work was stopped in order before its end, and the same command goes on with it.

    The command-line programs print it and exit with code 75, "try again later".
    """


class Fault(Exception):
    """Something went wrong that is not the user's doing, and its text is one line that says what.

    The command-line programs print it and exit with code 1; the same command may succeed.
    """


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)
