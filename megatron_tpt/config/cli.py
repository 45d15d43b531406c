"""Command lines from dataclasses, and the exit codes all programs share.

0 done, 2 a mistake that the user can fix, 75 stopped early in good order (the same command resumes), 1 a fault.
"""

import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_origin, get_type_hints

import tyro

from megatron_tpt import interrupts
from megatron_tpt.config.convert import expand_path
from megatron_tpt.errors import Fault, StoppedEarly, UserError, causes_of, failure, resource_message
from megatron_tpt.names import require_utf8, shown_lines
from megatron_tpt.processes import raise_file_limit

_RECIPE = "--recipe"
_COMMAND = re.compile(r"(?:python )?tools/(\w+)\.py|python -m megatron_tpt\.(pretrain|finetune)")


def parse[T](cls: type[T], argv: Sequence[str] | None = None, *, description: str | None = None) -> T:
    """Build a `cls` (a dataclass) from command-line options: `--text-column VALUE` for the field `text_column`.

    The docstring under a field is its help; a list takes several values. `--recipe FILE` puts the options of a YAML
    file in its place, `text_column: VALUE`; options after it win. An unknown option or a value of the wrong type ends
    the program with exit code 2; a `UserError` raised in `__post_init__` passes through. Raises UserError for a list
    that is given twice, of which only the last would count; of other options the last wins, with a line that says so.
    """
    argv = sys.argv[1:] if argv is None else argv
    _check_repeats(cls, argv)
    arguments = _with_recipes(argv)
    text = description and _one_command_a_line(as_called(description))
    return tyro.cli(cls, args=arguments, description=text, registry=_registry())


def _registry() -> tyro.constructors.ConstructorRegistry:
    """How options become values: as tyro has it, but for `~` in paths, which a shell leaves alone after "="."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: expand_path(words[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _one_command_a_line(description: str) -> str:
    """The examples of a tool's description as paragraphs: tyro joins the lines of a paragraph."""
    return re.sub(r"\n+(?=(?:python|torchrun|tpt-[a-z-]+) )", "\n\n", description)


def _check_repeats(cls: type, argv: Sequence[str]) -> None:
    given = Counter(_option_name(argument) for argument in argv if argument.startswith("--") and len(argument) > 2)
    kinds = {f"--{name.replace('_', '-')}": hint for name, hint in get_type_hints(cls, include_extras=True).items()}
    for name, count in given.items():
        if count == 1 or name == _RECIPE:
            continue
        declared = getattr(get_origin(kinds.get(name)), "__value__", kinds.get(name))
        if tyro.conf.UseAppendAction in getattr(declared, "__metadata__", ()):
            continue  # collects the values of all
        if get_origin(declared) is list:
            raise UserError(f"{name} is given {count} times: give it once, with all its values after it")
        print(f"note: {name} is given {count} times; the last one counts", file=sys.stderr)


def _option_name(argument: str) -> str:
    """`--text_column=x` and `--no-text-column` are the option `--text-column`."""
    name = argument.partition("=")[0].replace("_", "-")
    return f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name


def _with_recipes(argv: Sequence[str]) -> list[str]:
    """`argv` with each `--recipe FILE` replaced by the options in the file."""
    arguments: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, path = argument.partition("=")
        if name == _RECIPE:
            arguments += _recipe_options(expand_path(path if equals else next(rest, "")))
        else:
            arguments.append(argument)
    return arguments


def _recipe_options(path: Path) -> Iterator[str]:
    from megatron_tpt.config.yaml_file import load_yaml

    try:
        recipe, _ = load_yaml(path)
    except OSError as error:
        raise failure(f"{_RECIPE} {path}: cannot be read ({error.strerror})", error) from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a list of options, as in `model: DIR`")
    return _options(recipe, "--")


def _options(recipe: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in recipe.items():
        option = prefix + str(name).replace("_", "-")
        if isinstance(value, Mapping):
            yield from _options(value, f"{option}.")
        elif isinstance(value, bool):
            yield option if value else f"{prefix}no-{option.removeprefix(prefix)}"
        elif isinstance(value, list):
            yield from (option, *map(str, value))
        elif value is not None:
            yield from (option, str(value))


def console_name(name: str) -> str:
    """The console script of the tool or training program `name`: `tpt-merge-index` of "merge_index"."""
    return f"tpt-{name.replace('_', '-')}"


def as_called(text: str) -> str:
    """`text` with its commands in the form in which this program was called: in an installation there is no tools/,
    and console scripts stand for its files."""
    if not Path(sys.argv[0]).name.startswith("tpt-"):
        return text
    return _COMMAND.sub(lambda found: console_name(found[1] or found[2]), text)


def program(main: Callable[[], Any]) -> Callable[[], NoReturn]:
    """What a script or a console script calls: `main`, and then out of the process with the shared exit codes.

    Called when the program's module has been imported: from here on Ctrl-C is a KeyboardInterrupt again.
    """
    interrupts.restore()

    def command() -> NoReturn:
        run(main)

    return command


def run(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and leave the process with the shared exit codes."""
    try:
        require_utf8(sys.argv)
        raise_file_limit()
        _call(main)
    except (UserError, Fault) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun every process finds the same mistake
            print(f"error: {as_called(shown_lines(str(error)))}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except StoppedEarly as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(as_called(shown_lines(str(stop))))
        code = 75
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `... | head` closed our output: not a fault
        _discard_output()
        code = 0
    except Exception as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes_of(error)):
            code = 130  # Ctrl-C, in the midst of a clean-up that then met what was half done
        elif (refusal := resource_message(error)) is None:
            traceback.print_exc()
            code = 1
        else:
            print(f"error: {shown_lines(refusal)}", file=sys.stderr)
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
    """What is left to write to standard output goes nowhere: Python would try again, and complain, at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
