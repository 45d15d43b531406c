"""Command lines from dataclasses, and the exit codes all programs share: 0 done, 2 the user can mend it, 1 a fault."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from megatron_tpt.errors import UserError


def parse[T](cls: type[T], argv: Sequence[str] | None = None, *, description: str | None = None) -> T:
    """Build a `cls` (a dataclass) from command-line options: `--text-column VALUE` for the field `text_column`.

    The docstring under a field is its help; a list takes several values. An unknown option or a value of the wrong type
    ends the program with exit code 2; a `UserError` raised in `__post_init__` passes through.
    """
    return tyro.cli(cls, args=argv, description=description)


def run(main: Callable[[], Any]) -> None:
    """Call `main` and leave the process with the shared exit codes. Never returns."""
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every process finds the same mistake
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `... | head` closed our output: not a fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
