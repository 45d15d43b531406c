"""The results of an evaluation: figures for every arm on every benchmark, and all that is needed to defend them.

results.json depends on settings, data, weights and software alone, and on no clock: a run that was killed and resumed
leaves the same file as an unbroken one.
"""

import collections
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_tpt.evaluation import metrics, recurrences
from megatron_tpt.evaluation.arms import label
from megatron_tpt.evaluation.asking import Evaluation
from megatron_tpt.evaluation.contamination import contamination
from megatron_tpt.evaluation.perplexity import DocumentResult
from megatron_tpt.evaluation.samples import FAILED, Sample
from megatron_tpt.files import write_json
from megatron_tpt.grading import GraderPool, Item, Rules
from megatron_tpt.grading.kinds import PythonLiteral
from megatron_tpt.jobs.settings import read_settings
from megatron_tpt.json_data import read_object
from megatron_tpt.names import counted, first_few, shown
from megatron_tpt.provenance import environment

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


@dataclass(frozen=True)
class ModelResult:
    """What one model reached on one benchmark, at one depth."""

    model: str
    benchmark: str
    accuracy: float
    """Mean over problems of the share of right samples (pass@1)."""
    stderr: float | None
    """Standard error of `accuracy` over the problems; None for a single problem."""
    interval: tuple[float, float]
    """95% interval of `accuracy`."""
    num_problems: int
    num_samples: int
    """Samples per problem."""
    extraction_failures: int
    """Samples without a readable answer; they count as wrong."""
    unclosed_thinking: int
    """Samples whose thinking never ended; they are among `extraction_failures`."""
    grading_timeouts: int
    """Samples whose grading, or whose code, took too long; they count as wrong."""
    grading_crashes: int
    """Samples whose grading, or whose code, crashed; they count as wrong."""
    failed_requests: int
    """Samples that the engine could not make; they count as wrong, and the next run asks for them again."""
    truncated_fraction: float
    """Share of samples truncated at `max_new_tokens`."""
    mean_output_tokens: float
    thinking_tokens: tuple[float, float]
    """Mean and 95th percentile of the tokens up to `</think>`."""
    answer_tokens: tuple[float, float]
    """Mean and 95th percentile of the tokens after it."""
    samples: str
    """The file with the samples, relative to results.json."""
    pass_at: dict[str, float] = field(default_factory=dict)
    """pass@k by k."""
    majority_at: dict[str, float] = field(default_factory=dict)
    """majority@k by k; not for code and instructions."""
    spread: float | None = None
    """Standard deviation over the sample's numbers of the accuracy of each; None for one sample."""
    recurrences: int | None = None
    """Iterations of a recurrent model."""
    depths: dict[str, int] = field(default_factory=dict)
    """With early exit: generated tokens by the iterations after which they were chosen."""
    mean_depth: float | None = None
    """The mean of `depths`."""


def summarize(each: Evaluation, samples: Sequence[Sample], path: str) -> ModelResult:
    """The figures of one arm on one benchmark."""
    num_samples = each.options.num_samples
    pass_at, majority_at = {}, {}
    if num_samples > 1:
        pass_at = {str(k): metrics.pass_at_k(samples, k) for k in metrics.sizes(num_samples)}
        if each.options.answer_type not in ("code", "instructions"):
            votes = group_answers(samples, each.options.rules())
            majority_at = {str(k): metrics.majority_at_k(votes, k) for k in metrics.sizes(num_samples)}
    result = figures(each.arm.model, each.options.title, samples, path, pass_at, majority_at)
    return replace(result, recurrences=each.arm.recurrences)


def figures(
    model: str,
    benchmark: str,
    samples: Sequence[Sample],
    path: str,
    pass_at: dict[str, float] | None = None,
    majority_at: dict[str, float] | None = None,
) -> ModelResult:
    """A result from its samples, with what was counted beforehand."""
    rates = list(metrics.rates(samples).values())
    reasons = collections.Counter(sample.reason for sample in samples)
    depths = sum((collections.Counter(sample.depths) for sample in samples), collections.Counter[str]())
    return ModelResult(
        model=model,
        benchmark=benchmark,
        accuracy=statistics.fmean(rates),
        stderr=metrics.standard_error(rates),
        interval=metrics.interval(rates),
        num_problems=len(rates),
        num_samples=len(samples) // len(rates),
        extraction_failures=reasons["no answer"] + reasons["thinking not closed"],
        unclosed_thinking=reasons["thinking not closed"],
        grading_timeouts=reasons["time-out"],
        grading_crashes=reasons["crash"],
        failed_requests=sum(sample.finish_reason == FAILED for sample in samples),
        truncated_fraction=statistics.fmean(sample.finish_reason == "length" for sample in samples),
        mean_output_tokens=statistics.fmean(sample.output_tokens for sample in samples),
        thinking_tokens=metrics.mean_and_p95([sample.thinking_tokens for sample in samples]),
        answer_tokens=metrics.mean_and_p95([sample.answer_tokens for sample in samples]),
        samples=path,
        pass_at=pass_at or {},
        majority_at=majority_at or {},
        spread=metrics.spread(samples),
        depths=dict(sorted(depths.items(), key=lambda item: int(item[0]))),
        mean_depth=statistics.fmean(map(int, depths), depths.values()) if depths else None,
    )


def group_answers(samples: Sequence[Sample], rules: Rules) -> list[list[tuple[int | None, bool]]]:
    """For every problem and each of its samples, the group of its answer and whether it is right.

    Right answers are one group, equal texts are one, and of mathematics and literals what the grader finds the same as
    the first of a group.
    """
    problems = metrics.by_problem(samples)
    wrong = {
        name: list(dict.fromkeys(s.extracted for s in own if s.extracted is not None and not s.correct))
        for name, own in problems.items()
    }
    if rules.kind == "math":
        group_of = _groups_of_mathematics(wrong)
    elif rules.kind == "literal":
        group_of = {(name, answer): g for name, own in wrong.items() for answer, g in _groups_of_literals(own).items()}
    else:  # candidates are in one form: texts that differ are different answers
        group_of = {(name, answer): g for name, answers in wrong.items() for g, answer in enumerate(answers)}
    return [
        [(-1 if s.correct else None if s.extracted is None else group_of[name, s.extracted], s.correct) for s in own]
        for name, own in problems.items()
    ]


def _groups_of_literals(answers: Sequence[str]) -> dict[str, int]:
    """The group of every answer to one problem. A text that is no literal is a group of its own."""
    kind, leaders, group_of = PythonLiteral(), list[str](), dict[str, int]()
    for answer in answers:
        is_literal = kind.reference(answer) is not None
        same = (g for g, leader in enumerate(leaders) if is_literal and kind.same(leader, answer))
        if (group := next(same, None)) is None:
            group = len(leaders)
            leaders.append(answer)
        group_of[answer] = group
    return group_of


def _groups_of_mathematics(answers: Mapping[str, list[str]]) -> dict[tuple[str, str], int]:
    """The group of every answer of every problem. All problems advance together, to keep the graders busy."""
    waiting = {name: list(own) for name, own in answers.items()}
    leaders: dict[str, list[str]] = {name: [] for name in answers}
    group_of: dict[tuple[str, str], int] = {}
    with GraderPool(Rules("math")) as pool:
        while any(waiting.values()):  # the next answer of every problem against the groups that the problem has
            turn = [(name, answers.pop(0)) for name, answers in waiting.items() if answers]
            pairs = [(name, answer, g) for name, answer in turn for g in range(len(leaders[name]))]
            grades = pool.grade(
                [Item(f"\\boxed{{{answer}}}", f"\\boxed{{{leaders[name][g]}}}") for name, answer, g in pairs]
            )
            for (name, answer, g), grade in zip(pairs, grades, strict=True):
                if grade.correct:
                    group_of.setdefault((name, answer), g)
            for name, answer in turn:
                if (name, answer) not in group_of:
                    group_of[name, answer] = len(leaders[name])
                    leaders[name].append(answer)
    return group_of


def comparisons(evaluations: Sequence[Evaluation], graded: Sequence[Sequence[Sample]]) -> list[dict[str, Any]]:
    """The paired difference of every later arm from every earlier one, on each benchmark."""
    found = []
    for i, (first, own) in enumerate(zip(evaluations, graded, strict=True)):
        for second, others in zip(evaluations[i + 1 :], graded[i + 1 :], strict=True):
            if first.options.title != second.options.title:
                continue
            difference = metrics.difference(metrics.rates(own), metrics.rates(others))
            if difference is not None:
                names = {
                    "benchmark": first.options.title,
                    "model": second.arm.model,
                    "recurrences": second.arm.recurrences,
                    "than": first.arm.model,
                    "than_recurrences": first.arm.recurrences,
                }
                found.append(names | asdict(difference))
    return found


def write_results(
    output: Path,
    evaluations: Sequence[Evaluation],
    graded: Sequence[Sequence[Sample]],
    results: Sequence[ModelResult],
    documents: Sequence[DocumentResult],
) -> None:
    """Write results.json and the reports. `graded` and `results` are of the evaluations with answers."""
    from megatron_tpt.evaluation.report import write_reports

    first, arms = evaluations[0].options, list(dict.fromkeys(each.arm for each in evaluations))
    answered = [each for each in evaluations if not each.has_documents]
    models, scored = [asdict(result) for result in results], [asdict(result) for result in documents]
    points = recurrences.points(arms, first, models, scored) if first.depths() else []
    exits = first.early_exit()
    benchmarks = {each.options.title: _benchmark(each) for each in evaluations}
    made = [_provenance(each) for each in evaluations]
    content = {
        "format_version": FORMAT_VERSION,
        "engine": {
            "kind": _joined(one["engine"] for one in made),
            "dtype": _joined(one["dtype"] for one in made),
            "computed_in": _dtypes(evaluations),
            "tensor_parallel_size": _common(run.get("tensor_parallel_size") for one in made for run in one["runs"]),
            "early_exit": None if exits is None else asdict(exits),
            "versions": _versions(one["versions"] for one in made),
        },
        "grading": {"versions": _versions(one["grading"].get("versions") for one in made)},
        "environment": environment(),
        "provenance": made,
        "benchmarks": benchmarks,
        "models": models,
        "comparisons": comparisons(answered, graded),
        "contamination": contamination(answered, graded, first.corpus),
        "documents": scored,
        "recurrences": [asdict(point) for point in points],
    }
    _note_omitted(output / "results.json", made)
    write_json(output / "results.json", content)
    write_reports(output, content, graded)
    if points:
        recurrences.write_report(output, points)


def _note_omitted(path: Path, made: Sequence[Mapping[str, Any]]) -> None:
    """Say what the results of before have that these will not have: they are those of one command."""
    before = read_object(path, "remove it")
    entries = [one for part in ("models", "documents") for one in before.get(part, ()) if isinstance(one, dict)]
    now = set(map(_place, made))
    gone = [one for one in entries if _place(one) not in now]
    if gone:
        names = [f"{label(str(one.get('model')), one.get('recurrences'))} on {one.get('benchmark')}" for one in gone]
        logger.info(
            f"results.json is of this command alone, and no longer has {shown(first_few(names, 3))}, whose samples "
            "stay; one command that names all has all"
        )


def _place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return str(Path(str(entry.get("model")))), entry.get("recurrences"), entry.get("benchmark")


def _dtypes(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """What the answers of every arm were computed in, where its engine said so."""
    found = {label(each.arm.model, each.arm.recurrences): each.store.dtype() for each in evaluations}
    return {name: dtype for name, dtype in found.items() if dtype is not None}


def _provenance(each: Evaluation) -> dict[str, Any]:
    """What made the answers of an arm to a benchmark, and their grades, as was noted then."""
    asked, grading = read_settings(each.store.settings_path) or {}, each.store.grading()
    return {
        "model": each.arm.model,
        "recurrences": each.arm.recurrences,
        "benchmark": each.options.title,
        "weights": asked.get("model"),
        **{name: asked.get(name) for name in ("tokenizer", "engine", "dtype", "versions")},
        "runs": each.store.runs(),
        "grading": {name: grading[name] for name in ("versions", "package") if name in grading},
    }


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


def _common(values: Iterable[Any]) -> Any | None:
    """The only one of the values; None where they differ, or there is none."""
    found = list(values)
    return found[0] if found and all(value == found[0] for value in found) else None


def _versions(found: Iterable[Mapping[str, str] | None]) -> dict[str, str]:
    """The versions by library; of one that changed, all."""
    by_name: dict[str, list[str]] = {}
    for versions in found:
        for name, version in (versions or {}).items():
            by_name.setdefault(name, []).append(version)
    return {name: _joined(versions) for name, versions in by_name.items()}


def _benchmark(each: Evaluation) -> dict[str, Any]:
    """How a benchmark was asked, and where its problems come from."""
    return each.options.settings() | {
        "data": each.problem_set.data,
        "data_sha256": each.problem_set.data_sha256,
        "num_problems": len(each.problems),
        "num_rows": each.problem_set.num_rows,
    }


def describe(result: ModelResult, *, is_scored: bool = False) -> str:
    """A result on one line; where options were scored, without what is known of answers that were written."""
    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    name = f"{shown(label(result.model, result.recurrences))}, {shown(result.benchmark)}"
    depth = "" if result.mean_depth is None else f", {result.mean_depth:.2f} iterations per token"
    num_samples = result.num_problems * result.num_samples
    thinking = f" ({result.unclosed_thinking:,} of them in thinking)" if result.unclosed_thinking else ""
    written = (
        ""
        if is_scored
        else (
            f", no answer in {result.extraction_failures:,} of {counted(num_samples, 'sample')}{thinking}, "
            f"{result.truncated_fraction:.1%} of samples truncated, {result.mean_output_tokens:.1f} tokens per sample"
        )
    )
    trouble = "".join(
        f", {count:,} {what}"
        for count, what in (
            (result.grading_timeouts, "timed out"),
            (result.grading_crashes, "crashed"),
            (result.failed_requests, "failed"),
        )
        if count
    )
    return (
        f"{name}: accuracy {result.accuracy:.4f}{error} on "
        f"{counted(result.num_problems, 'problem')}{written}{trouble}{depth}"
    )
