"""Problems: rows of a prompt and a reference answer, under whatever names the files have for them. And documents."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.grading import LETTERS
from megatron_tpt.records import describe, expand_sources, read_rows


@dataclass(frozen=True)
class Problem:
    """A problem as the model sees it, and the answer it should give."""

    id: str
    prompt: str
    answer: Any
    """The reference as the row has it: text, number, boolean or a list of them."""
    where: str
    """"file:line", for messages."""
    choices: tuple[str, ...] = ()
    code_prefix: str = ""


def read_problems(options: EvaluateOptions) -> list[Problem]:
    """The problems of `options.data`, at most `limit`; none without data. Raises UserError naming the line of a bad
    one."""
    if options.data is None:
        return []
    template = _template(options)
    answer_template = options.answer_template and _template_text(options.answer_template)
    before = "" if options.few_shot is None else _read_text(options.few_shot)
    problems: dict[str, Problem] = {}
    for where, default_id, row in _rows(options.data):
        if len(problems) == options.limit:
            break
        name = str(row.get(options.id_column, default_id))
        if name in problems:
            raise UserError(f"{where}: id {name!r} was there before; ids must differ (choose another --id-column)")
        choices = _choices(row, options.choices_column, where)
        shown = {**row, options.choices_column: _render(choices)} if options.choices_column else row
        problems[name] = Problem(
            id=name,
            prompt=before + _fill(template, shown, where),
            answer=_fill(answer_template, row, where)
            if answer_template
            else _answer(row, options.answer_column, where),
            where=where,
            choices=choices,
            code_prefix=_column(row, options.code_prefix_column, where) if options.code_prefix_column else "",
        )
    if not problems:
        raise UserError(f"{options.data}: no problems in this file")
    return list(problems.values())


def read_documents(options: EvaluateOptions) -> list[str]:
    """The texts of `options.documents`, at most `limit`. Raises UserError naming the line of one without text."""
    if options.documents is None:
        return []
    texts: list[str] = []
    for where, _, row in itertools.islice(_rows(options.documents), options.limit):
        text = row.get(options.text_column)
        if not isinstance(text, str) or not text:
            raise UserError(
                f"{where}: column {options.text_column!r} has no text; its columns are {', '.join(row) or 'none'}: "
                f"choose another --text-column, or remove the row"
            )
        texts.append(text)
    if not texts:
        raise UserError(f"{options.documents}: no documents in this file")
    return texts


def _template(options: EvaluateOptions) -> str:
    if options.prompt_template is None:
        options_below = f"\n{{{options.choices_column}}}" if options.choices_column else ""
        return "{" + options.prompt_column + "}" + options_below
    return _template_text(options.prompt_template)


def _template_text(given: str) -> str:
    if "{" in given:
        return given.replace("\\n", "\n")  # as it is typed on a command line
    template = _read_text(Path(given))
    if "{" not in template:
        raise UserError(f"{given}: the template names no column, such as {{question}}")
    return template


def _fill(template: str, row: Mapping[str, Any], where: str) -> str:
    # Braces that name no column stay, so that a template can hold LaTeX.
    return re.sub(r"\{(\w+)\}", lambda match: _column(row, match[1], where), template)


def _answer(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = _value(row, name, where)
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        return _number_or_text(value, name, where)
    if not value:
        raise UserError(f"{where}: column {name!r} is an empty list; give at least one answer")
    return [item if isinstance(item, bool) else _number_or_text(item, name, where) for item in value]


def _choices(row: Mapping[str, Any], name: str | None, where: str) -> tuple[str, ...]:
    if name is None:
        return ()
    value = _value(row, name, where)
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise UserError(f"{where}: column {name!r} is not a list of 2 to {len(LETTERS)} options")
    return tuple(str(_number_or_text(item, name, where)) for item in value)


def _render(choices: Sequence[str]) -> str:
    return "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    return str(_number_or_text(_value(row, name, where), name, where))


def _value(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = row.get(name)
    if value is None:
        raise UserError(f"{where}: no column {name!r}; its columns are {', '.join(row) or 'none'}")
    return value


def _number_or_text(value: Any, name: str, where: str) -> str | int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: column {name!r} is neither text nor number")
    return value


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
