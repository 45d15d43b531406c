"""What ends a program with one line in place of a traceback."""

import errno
import os

# What is wrong with the name or the rights of a file, and not with the disk or the network.
_USERS_ERRNOS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP
}  # fmt: skip


FILE_LIMIT_ADVICE = "raise the limit of open files (ulimit -n 4096)"

_AGAIN = " and run the same command again"
_RESOURCES = {
    errno.ENOSPC: f"the disk is full{{place}}; make room{_AGAIN}",
    errno.EROFS: f"the file system can only be read{{place}}; have it mounted for writing{_AGAIN}",
    errno.EPERM: "not permitted{place}; choose another path",
    errno.EACCES: "permission denied{place}; have its owner allow it (umask 002 in shared folders), or choose another "
    "path",
    errno.ENAMETOOLONG: "the name is too long{place}; choose another path",
    errno.ELOOP: "links lead to each other{place}; choose another path",
    errno.EFBIG: f"a file would be larger than the system allows{{place}}; raise the limit (ulimit -f){_AGAIN}",
    errno.EMFILE: f"too many open files{{place}}; {FILE_LIMIT_ADVICE}{_AGAIN}",
    errno.ENFILE: f"the machine has too many open files{{place}}; end other programs{_AGAIN}",
}
"""What ends a program that wants more than the machine has or allows, and what to do."""


class UserError(Exception):
    """Something the user can fix; its text is one line that says what is wrong and what to change.

    The command-line programs print it without a traceback and exit with code 2. (It is no ValueError: the libraries
    that fill dataclasses from options and YAML catch those and wrap them in many lines.)
    """


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C: no Exception, which the code that it hits might handle. Raised within
    processes.terminations_raised."""


class StoppedEarly(Exception):
    """The work was stopped in an orderly way before its end, and the same command resumes it.

    The command-line programs print it and exit with code 75, "try again later".
    """


class Fault(Exception):
    """Something went wrong that is not the user's doing, and its text is one line that says what.

    The command-line programs print it and exit with code 1; the same command may succeed.
    """


def failure(message: str, error: BaseException) -> UserError | Fault:
    """What to raise, with `message`, when reading a file or asking the Hub has ended in `error`.

    A Fault where the disk or the network failed, on this machine and now; a UserError for a name that is missing or
    may not be read, and for what was read and is not fit.
    """
    causes = causes_of(error)
    if any(isinstance(cause, OSError) and cause.errno == errno.EMFILE for cause in causes):
        return UserError(f"{message}; {FILE_LIMIT_ADVICE}")
    return (Fault if any(map(_is_of_disk_or_network, causes)) else UserError)(message)


def is_of_full_disk(error: BaseException) -> bool:
    """Whether a full disk or quota is what an error came from; libraries in Rust and C++ report it only in words."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or f"os error {errno.ENOSPC})" in str(cause)
        or os.strerror(errno.ENOSPC) in str(cause)
        for cause in causes_of(error)
    )


def resource_message(error: BaseException) -> str | None:
    """The message for an error whose cause is the machine, not the program; None for any other."""
    code = errno.ENOSPC if is_of_full_disk(error) else getattr(error, "errno", None)
    name = str(getattr(error, "filename", None) or "")[:300]
    return _RESOURCES[code].format(place=name and f" ({name})") if code in _RESOURCES else None


def one_line(error: BaseException, most: int = 300, *, with_kind: bool = False) -> str:
    """What `error` says, behind its kind or without, on one line of at most `most` characters."""
    text = f"{type(error).__name__}: {error}" if with_kind else str(error)
    return " ".join(text.split())[:most] or type(error).__name__


def causes_of(error: BaseException) -> list[BaseException]:
    """An error and those that it came from, the first last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _is_of_disk_or_network(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:  # the Hub's answer
        return status in (408, 425, 429) or status >= 500
    if "TransportError" in [kind.__name__ for kind in type(error).__mro__]:  # httpx's, whichever of its versions
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _USERS_ERRNOS


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)
