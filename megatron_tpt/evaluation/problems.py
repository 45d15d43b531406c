"""Problems: rows of a prompt and a reference answer, under whatever names the files have for them; or documents."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.benchmark import Benchmark
from megatron_tpt.evaluation.choices import read_choices
from megatron_tpt.evaluation.shots import Shots, read_shots
from megatron_tpt.evaluation.templates import (
    column,
    fill,
    num_rows_of,
    number_or_text,
    rows_of,
    template_text,
    value_of,
)
from megatron_tpt.files import file_checksum


@dataclass(frozen=True)
class Problem:
    """A problem as the model sees it, and the answer it should give."""

    id: str
    prompt: str
    answer: Any
    """The reference as the row has it: text, number, boolean or a list of them; an option's letter where the row names
    it by a label, or the options were shuffled; several columns by their names; None of a document."""
    where: str
    """"file:line", for messages."""
    choices: tuple[str, ...] = ()
    code_prefix: str = ""


@dataclass(frozen=True)
class ProblemSet:
    """The problems of a benchmark, and where they come from."""

    problems: list[Problem]
    data: str
    """As it was given, or found in the data folder."""
    data_sha256: str
    """Of the file, where there is one; else of the rows."""
    num_rows: int | None = None
    """All that there are, where `limit` takes only the first; None where counting them would mean to fetch them."""


def read_problems(benchmark: Benchmark, data_dir: Path | None = None) -> list[Problem]:
    """The problems of `benchmark`, at most `limit`. Raises UserError naming the line of a bad one."""
    return read_problem_set(benchmark, data_dir).problems


def read_problem_set(benchmark: Benchmark, data_dir: Path | None = None) -> ProblemSet:
    """The problems of `benchmark` with their source, as `read_problems` reads them."""
    data = find_data(benchmark, data_dir)
    template = None if benchmark.prompt_template is None else template_text(benchmark.prompt_template)
    answer_template = benchmark.answer_template and template_text(benchmark.answer_template)
    shots = read_shots(benchmark, data_dir)
    problems: dict[str, Problem] = {}
    rows = hashlib.sha256()
    for where, default_id, row in rows_of(data):
        if len(problems) == benchmark.limit:
            break
        name = str(default_id if row.get(benchmark.id_column) is None else row[benchmark.id_column])
        if name in problems:
            raise UserError(f"{where}: id {name!r} was there before; ids must differ (choose another --id-column)")
        rows.update(json.dumps(row, sort_keys=True, default=str).encode())
        problems[name] = _problem(benchmark, row, name, where, template, answer_template, shots)
    if not problems:
        raise UserError(f"{data}: no problems in this file")
    path = Path(data)
    digest = file_checksum(path) if path.is_file() else f"sha256:{rows.hexdigest()}"
    num_rows = num_rows_of(path) if path.is_file() and benchmark.limit is not None else None
    return ProblemSet(list(problems.values()), str(data), digest, num_rows)


def find_data(benchmark: Benchmark, data_dir: Path | None) -> str | Path:
    """Where the problems are: the benchmark's file in the data folder, or what `data` names."""
    if data_dir is not None and benchmark.data_file is not None:
        return benchmark.file_in(data_dir, benchmark.data_file, "the problems")
    if benchmark.data is None:
        raise UserError(
            f"{benchmark.title}: give the folder with {benchmark.data_file} as --data-dir{benchmark.advice}"
        )
    return benchmark.data


def _problem(
    benchmark: Benchmark,
    row: Mapping[str, Any],
    name: str,
    where: str,
    template: str | None,
    answer_template: str | None,
    shots: Shots | None,
) -> Problem:
    choices = read_choices(benchmark, row, where)
    if choices is not None and benchmark.shuffle_choices:
        choices = choices.shuffled(random.Random(f"{benchmark.seed} {name}"))
    option = "" if template is None else "--prompt-template"
    if template is None:
        template = "{" + benchmark.prompt_column + "}"
        template += "\n{choices}" if choices is not None and benchmark.scoring == "generate" else ""
    prompt = fill(template, row, where, choices.placeholders() if choices else {}, option)
    if benchmark.scoring == "log-likelihood" and benchmark.likelihood_of == "rest":
        _, blank, rest = prompt.rpartition(benchmark.blank)
        if not (blank and rest.strip()):
            raise UserError(
                f"{where}: --likelihood-of rest is of the text after the blank {benchmark.blank!r}, and there is none; "
                "correct the row, or give --blank"
            )
    answer: Any
    if benchmark.scoring == "perplexity":
        answer = None
        if not prompt:
            raise UserError(f"{where}: column {benchmark.prompt_column!r} has no text; remove the row")
    elif benchmark.answer_columns:
        answer = {name: value_of(row, name, where) for name in benchmark.answer_columns.split(",")}
    else:
        answer = (
            fill(answer_template, row, where, option="--answer-template")
            if answer_template
            else _answer(row, benchmark.answer_column, where)
        )
        if choices is not None and benchmark.answer_type == "choice":
            choices.check_answer(answer, where)
        answer = choices.letter_of(answer, where) if choices is not None else answer
    return Problem(
        id=name,
        prompt=(shots.before(row, where) if shots else "") + prompt,
        answer=answer,
        where=where,
        choices=choices.texts if choices else (),
        code_prefix=column(row, benchmark.code_prefix_column, where) if benchmark.code_prefix_column else "",
    )


def _answer(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = value_of(row, name, where)
    if isinstance(value, bool):
        return value
    if not isinstance(value, list):
        return number_or_text(value, name, where)
    if not value:
        raise UserError(f"{where}: column {name!r} is an empty list; give at least one answer")
    return [item if isinstance(item, bool) else number_or_text(item, name, where) for item in value]
