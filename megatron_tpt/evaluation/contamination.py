"""Which problems of a benchmark a training corpus held, as `--decontaminate` of `tools/prepare.py` and
`tools/curate.py` found them.

A benchmark is known there by the fingerprint of its file, so that the numbers of items are those of the same rows.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation import metrics
from megatron_tpt.evaluation.asking import Evaluation
from megatron_tpt.evaluation.samples import Sample
from megatron_tpt.files import file_fingerprint
from megatron_tpt.json_data import read_object

_TOOLS = ("prepare", "curate")
"""The tools whose folders are known: the settings are in a file of their name."""


def _files(corpus: Path) -> tuple[Path, Path]:
    """What was found in a corpus, and what was asked for. Raises UserError for a folder without both."""
    report = corpus / "report.json"
    settings = next((path for path in (corpus / f"{tool}.json" for tool in _TOOLS) if path.is_file()), None)
    if settings is None or not report.is_file():
        raise UserError(f"--corpus {corpus}: no finished output of tools/prepare.py or tools/curate.py in this folder")
    return report, settings


def _searched(corpus: Path) -> dict[str, set[int]]:
    """For the fingerprint of every file that was searched for: the rows, counted from 1 without blank lines, of which
    the corpus held a part before it was cleaned. Raises UserError for a folder without finished output, and for damaged
    files."""
    files = _files(corpus)
    found: dict[str, set[int]] = {}
    try:
        report, settings = map(read_object, files)
        for each in settings["decontaminate"]:
            if len(each["files"]) == 1:
                [fingerprint] = each["files"].values()
                found.setdefault(fingerprint, set()).update(map(int, report["found_items"].get(each["name"], [])))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"--corpus {corpus}: its {' or '.join(file.name for file in files)} is damaged; run "
            f"tools/{files[1].stem}.py on the corpus again"
        ) from None
    return found


def overlapping_rows(corpus: Path, data: str) -> set[int] | None:
    """The rows of `data`, counted from 1 without blank lines, of which the corpus held a part before it was cleaned;
    None where they were not searched for."""
    path = Path(data)
    if not path.is_file():  # of the Hub: which rows were read is not known
        return None
    return _searched(corpus).get(file_fingerprint(path))


def check_corpora(corpora: Sequence[Path]) -> None:
    """Raise UserError for a folder without a finished run of tools/prepare.py or tools/curate.py."""
    for corpus in corpora:
        _searched(corpus)


def contamination(
    evaluations: Sequence[Evaluation], graded: Sequence[Sequence[Sample]], corpora: Sequence[Path]
) -> list[dict[str, Any]]:
    """For every arm, benchmark and corpus: how many problems overlap, and the accuracy on the others."""
    found = []
    for each, samples in zip(evaluations, graded, strict=True):
        rates = metrics.rates(samples)
        for corpus in corpora:
            rows = overlapping_rows(corpus, each.problem_set.data)
            entry: dict[str, Any] = {
                "model": each.arm.model,
                "recurrences": each.arm.recurrences,
                "benchmark": each.options.title,
                "corpus": str(corpus),
                "num_problems": len(each.problems),
                "num_overlapping": None,
                "accuracy_without": None,
            }
            if rows is not None:
                held = {problem.id for number, problem in enumerate(each.problems, 1) if number in rows}
                others = [rate for name, rate in rates.items() if name not in held]
                entry["num_overlapping"] = len(held)
                entry["accuracy_without"] = statistics.fmean(others) if others else None
            found.append(entry)
    return found
