"""Problems: rows of a prompt and a reference answer, under whatever names the files have for them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.records import describe, expand_sources, read_rows


@dataclass(frozen=True)
class Problem:
    """A problem as the model sees it, and the answer it should give."""

    id: str
    prompt: str
    answer: str
    where: str
    """"file:line", for messages."""


def read_problems(options: EvaluateOptions) -> list[Problem]:
    """The problems of `options.data`, at most `limit`. Raises UserError naming the line of a bad one."""
    template = _template(options)
    before = "" if options.few_shot is None else _read_text(options.few_shot)
    problems: dict[str, Problem] = {}
    for where, default_id, row in _rows(options.data):
        if len(problems) == options.limit:
            break
        name = str(row.get(options.id_column, default_id))
        if name in problems:
            raise UserError(f"{where}: id {name!r} was there before; ids must differ (choose another --id-column)")
        answer = _column(row, options.answer_column, where)
        problems[name] = Problem(name, before + _fill(template, row, where), answer, where)
    if not problems:
        raise UserError(f"{options.data}: no problems in this file")
    return list(problems.values())


def _template(options: EvaluateOptions) -> str:
    if options.prompt_template is None:
        return "{" + options.prompt_column + "}"
    if "{" in options.prompt_template:
        return options.prompt_template.replace("\\n", "\n")  # as it is typed on a command line
    template = _read_text(Path(options.prompt_template))
    if "{" not in template:
        raise UserError(f"{options.prompt_template}: the template names no column, such as {{question}}")
    return template


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    # Braces that name no column stay, so that a template can hold LaTeX.
    return re.sub(r"\{(\w+)\}", lambda match: _column(row, match[1], where), template)


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        raise UserError(f"{where}: no column {name!r}; its columns are {', '.join(row) or 'none'}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: column {name!r} is neither text nor number")
    return str(value)


def _rows(data: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place ("file:line"), an id (the line's number; of several files, the place) and the fields of every row."""
    sources = expand_sources([data])
    for source in sources:
        for row in read_rows(source):
            if row.value is None:
                raise UserError(describe(source, row, "fix the line"))
            place = f"{source.name}:{row.number + 1}"
            yield place, place if len(sources) > 1 else str(row.number + 1), row.value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
