"""Worked examples before a prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.benchmark import FOLDER, Benchmark
from megatron_tpt.evaluation.choices import read_choices
from megatron_tpt.evaluation.templates import column, fill, read_text, rows_of, template_text
from megatron_tpt.names import counted
from megatron_tpt.records import SUFFIXES


@dataclass(frozen=True)
class Shots:
    """The examples of a benchmark."""

    texts: Mapping[str, str]
    """What goes before a prompt, by the group of its problem; of "" where there are no groups."""
    group: str | None
    source: str

    def before(self, row: Mapping[str, Any], where: str) -> str:
        """What goes before the prompt of the problem in `row`."""
        name = column(row, self.group, where) if self.group is not None else ""
        if name not in self.texts:
            raise UserError(f"{where}: {self.source} has no examples for {name!r}")
        return self.texts[name]


def read_shots(benchmark: Benchmark, data_dir: Path | None = None) -> Shots | None:
    """The examples of `benchmark`; None where it has none."""
    source = _find(benchmark, data_dir)
    if source is None:
        return None
    if not str(source).startswith("hf://") and not str(source).endswith((*SUFFIXES, ".parquet", ".arrow")):
        text = read_text(Path(source))
        return Shots({"": _first(benchmark, [text]) if benchmark.num_shots else text}, None, str(source))
    template, groups = template_text(benchmark.shot_template), dict[str, list[str]]()
    for where, _, row in rows_of(source):
        choices = read_choices(benchmark, row, where) if "{choices}" in template else None
        text = fill(template, row, where, choices.placeholders() if choices else {}, "--shot-template")
        group = column(row, benchmark.shot_group, where) if benchmark.shot_group is not None else ""
        groups.setdefault(group, []).append(text)
    if not groups:
        raise UserError(f"{source}: no examples in this file")
    return Shots({name: _first(benchmark, texts) for name, texts in groups.items()}, benchmark.shot_group, str(source))


def _find(benchmark: Benchmark, data_dir: Path | None) -> str | Path | None:
    if data_dir is not None and benchmark.few_shot_file is not None:
        return benchmark.file_in(data_dir, benchmark.few_shot_file, "the worked examples")
    if benchmark.few_shot is None:
        if benchmark.few_shot_file is not None:
            raise UserError(f"{benchmark.title}: give the folder with {benchmark.few_shot_file} as --data-dir")
        return None
    own = FOLDER / str(benchmark.few_shot)
    return own if own.is_file() else benchmark.few_shot


def _first(benchmark: Benchmark, texts: Sequence[str]) -> str:
    """The first `num_shots` examples, of one text for each or one text with all."""
    number, head, parts = benchmark.num_shots, "", list(texts)
    if number is not None and len(texts) == 1 and benchmark.shot_begin is not None:
        head, parts = _split(texts[0], benchmark.shot_begin)
    elif number is not None and number > 1 and len(texts) == 1:
        raise UserError(f"--num-shots {number}: there is one text of examples; say by --shot-begin how each begins")
    if number is not None and len(parts) < number:
        raise UserError(f"--num-shots {number}: the text has only {counted(len(parts), 'example')}")
    return head + "".join(parts[:number])


def _split(text: str, begin: str) -> tuple[str, list[str]]:
    """What goes before the examples in a text, and the examples, each with an empty line after it."""
    head, *rest = f"\n\n{text.strip()}".split(f"\n\n{begin}")
    return f"{head.strip()}\n\n" if head.strip() else "", [f"{begin}{part.strip()}\n\n" for part in rest]
