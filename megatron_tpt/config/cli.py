"""Command lines from dataclasses, and the exit codes all programs share.

0 done, 2 a mistake that the user can fix, 75 stopped early but cleanly (the same command resumes), 130 Ctrl-C, 1 a
fault.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_tpt import logs
from megatron_tpt.config.command_line import GivenOptions
from megatron_tpt.config.convert import Converter
from megatron_tpt.errors import Fault, StoppedEarly, UserError, causes_of, resource_message
from megatron_tpt.names import require_utf8, shown_lines
from megatron_tpt.processes import raise_file_limit

logger = logging.getLogger(__name__)

_COMMAND = re.compile(r"(?:python )?tools/(\w+)\.py|python -m megatron_tpt\.(pretrain|finetune|rl)")


def parse[T](cls: type[T], argv: Sequence[str] | None = None, *, description: str | None = None) -> T:
    """Build a `cls` (a dataclass) from command-line options: `--text-column VALUE` for the field `text_column`.

    The docstring under a field is its help; a list takes several values. `--recipe FILE` puts the options of a YAML
    file in its place, `text_column: VALUE`; options after it win. Raises UserError with all that is wrong, one line
    each. `--help` prints every option and leaves with code 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        from megatron_tpt.config.describe import options_help

        logs.print_result(options_help(cls, as_called(description or cls.__doc__ or "")))
        raise SystemExit(0)
    given = GivenOptions(cls, argv)
    converter = Converter(given.where, given.suggest, given.name_of, given.problems)
    options = converter.section(cls, given.content, ())
    for warning in converter.warnings:
        logger.warning(warning)
    converter.raise_problems()
    return options


def console_name(name: str) -> str:
    """The console script of the tool or training program `name`: `tpt-merge-index` of "merge_index"."""
    return f"tpt-{name.replace('_', '-')}"


def as_called(text: str) -> str:
    """`text` with its commands in the form in which this program was called: in an installation there is no tools/,
    and console scripts take the place of its files."""
    if not Path(sys.argv[0]).name.startswith("tpt-"):
        return text
    return _COMMAND.sub(lambda found: console_name(found[1] or found[2]), text)


def program(main: Callable[[], Any]) -> Callable[[], NoReturn]:
    """What a script or a console script calls: `main`, and then out of the process with the shared exit codes.

    Called when the program's module has been imported: from here on Ctrl-C is a KeyboardInterrupt again.
    """
    _restore_interrupts()

    def command() -> NoReturn:
        run(main)

    return command


def _restore_interrupts() -> None:
    from megatron_tpt import interrupts  # not above: who imports this module alone keeps Ctrl-C as it is

    interrupts.restore()


def run(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and leave the process with the shared exit codes."""
    _restore_interrupts()
    try:
        logs.configure()
        require_utf8(sys.argv)
        raise_file_limit()
        _call(main)
    except (UserError, Fault) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every process finds the same mistake
            logs.print_error(as_called(shown_lines(str(error))))
        code = 2 if isinstance(error, UserError) else 1
    except StoppedEarly as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            logs.print_result(as_called(shown_lines(str(stop))))
        code = 75
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `... | head` closed our output: not a fault
        _discard_output()
        code = 0
    except Exception as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes_of(error)):
            code = 130  # Ctrl-C during a clean-up that then failed on what was half done
        elif (refusal := resource_message(error)) is None:
            traceback.print_exc()
            code = 1
        else:
            logs.print_error(shown_lines(refusal))
            code = 2
    else:
        code = 0
    try:
        sys.stdout.flush()
    except OSError:  # said above, where nothing worse was
        _discard_output()
    sys.stderr.flush()
    sys.exit(code)


def _call(main: Callable[[], Any]) -> None:
    """Call `main`; what it printed is written when it ends, by SystemExit too."""
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _discard_output() -> None:
    """Discard what is left to write to standard output: Python would retry at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
