"""Evaluating: every model answers the problems of every benchmark; the answers are graded when all are there.

OUTPUT/results.json                                  figures of every model on every benchmark, and how they were made
OUTPUT/report.md, report.html                        the figures as tables, and failing samples to read
OUTPUT/<model>/<benchmark>/samples.jsonl.zst         every output, what was read from it, and whether it is right
OUTPUT/<model>/r4/<benchmark>/...                    the same of a recurrent model at each of several depths,
OUTPUT/recurrences.md, recurrences.png               and these side by side

The same command resumes: what is there is not asked again. With --num-tasks the problems are dealt to tasks, which run
on this machine, SLURM or Ray; the command that started them grades when all have answered.
"""

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_tpt.errors import Fault, UserError
from megatron_tpt.evaluation.arms import label, plan_arms
from megatron_tpt.evaluation.asking import Evaluation, ask, check_contexts, render_prompts
from megatron_tpt.evaluation.benchmark import Benchmark
from megatron_tpt.evaluation.contamination import check_corpora
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.perplexity import DocumentResult, describe_documents, summarize_documents
from megatron_tpt.evaluation.problems import Problem, ProblemSet, read_problem_set
from megatron_tpt.evaluation.provenance import grading_versions
from megatron_tpt.evaluation.results import ModelResult, describe, summarize, write_results
from megatron_tpt.evaluation.samples import FAILED, Answer, Key, Sample, Store, require_complete
from megatron_tpt.evaluation.settings import check, grading_of, note, settings_of
from megatron_tpt.files import write_json
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.grading import Grade, Grader, GraderPool, Item, opens_thinking
from megatron_tpt.jobs.folder import JobFolder
from megatron_tpt.jobs.local_tasks import sigterm_as_exit
from megatron_tpt.jobs.lock import exclusive
from megatron_tpt.jobs.settings import read_settings
from megatron_tpt.names import counted, first_few, shown
from megatron_tpt.provenance import environment

logger = logging.getLogger(__name__)

_OF_ONE = frozenset(each.name for each in fields(Benchmark)) | {"benchmark", "data_dir", "documents", "text_column"}
"""The options that benchmarks have of their own."""
_SHOWN_CHANGES = 10
_MAX_REFERENCE = 20_000
"""Characters."""


def evaluate(
    options: EvaluateOptions | Sequence[EvaluateOptions], command: Sequence[str] | None = None
) -> list[ModelResult]:
    """Do what `tools/evaluate.py` does, with options for each benchmark (`parse_benchmarks`); `command` starts tasks.

    Returns a result for every arm (a model at one depth) and benchmark with answers; none where other tasks are still
    at it. Raises UserError for what the user can fix, before any model is loaded, and Fault at the end when requests
    failed.
    """
    runs = options.with_documents() if isinstance(options, EvaluateOptions) else list(options)
    _check_runs(runs)
    sets = _read_all(runs)
    first = runs[0]
    evaluations = list(_evaluations(list(zip(runs, sets, strict=True))))
    by_arm = [list(group) for _, group in itertools.groupby(evaluations, key=lambda each: each.arm)]
    settings = [settings_of(each) for each in evaluations]
    job = JobFolder(first.output, "results.json")
    is_running = bool(job.running_tasks())
    for each, now in zip(evaluations, settings, strict=True):
        check(each, now, is_running=is_running)
    with _interruption_named(evaluations):
        if not first.rescore:
            for group in by_arm:
                check_contexts(group)
            for each, now in zip(evaluations, settings, strict=True):
                note(each, now)
            if not _answer(by_arm, job, first, command):
                return []
        with _grading_lock(job):
            return _conclude(evaluations, first)


@contextlib.contextmanager
def _interruption_named(evaluations: Sequence[Evaluation]) -> Iterator[None]:
    """Say what Ctrl-C or SIGTERM leaves."""
    try:
        with sigterm_as_exit():
            yield
    except (KeyboardInterrupt, SystemExit) as end:
        answers = [answer for each in evaluations for answer in each.answers().values()]
        number = sum(answer.finish_reason != FAILED for answer in answers)
        total = sum(len(each.keys) for each in evaluations)
        how = "interrupted" if isinstance(end, KeyboardInterrupt) else "stopped by SIGTERM"
        logger.warning(f"{how}: {number:,} of {counted(total, 'answer')} stored; the same command resumes")
        raise


def _answer(
    by_arm: Sequence[Sequence[Evaluation]], job: JobFolder, options: EvaluateOptions, command: Sequence[str] | None
) -> bool:
    """Have what is missing answered; whether all is there, and this process is to grade it."""
    if options.task is None and options.scale.is_split:
        if any(each.missing() for group in by_arm for each in group):
            if command is None:
                raise UserError("--num-tasks and --executor need the command that starts a task")
            report = job.launch(command, options.scale)
            if report.exit_code or any(result.state == "submitted" for result in report.results):
                logger.warning("not graded: answers are missing; the same command continues")
                return False
        return True
    task, num_tasks = options.task or 0, options.scale.num_tasks
    if _is_missing(by_arm, task, num_tasks):
        with job.task_lock(task):
            with exclusive(_grading_path(job), "grading", timeout_s=10):
                pass  # no journal is written while others are taken up; who grades from now on waits for this task
            for group in by_arm:
                ask(group, task, num_tasks)
    if options.task is not None:
        job.note_finished(task, num_tasks)
    return options.task is None


@contextlib.contextmanager
def _grading_lock(job: JobFolder) -> Iterator[None]:
    """Grade alone: no task adds answers meanwhile, which would be lost with the journals. Raises TaskLocked."""
    with exclusive(_grading_path(job), "grading", timeout_s=10):
        for task in job.running_tasks():
            with job.task_lock(task):
                pass  # it has ended
        yield


def _grading_path(job: JobFolder) -> Path:
    return job.locks / ".grading.lock"


def _is_missing(by_arm: Sequence[Sequence[Evaluation]], task: int, num_tasks: int) -> bool:
    return any(each.missing(task, num_tasks) for group in by_arm for each in group)


def _check_runs(runs: Sequence[EvaluateOptions]) -> None:
    check_corpora(runs[0].corpus)
    titles = [run.title for run in runs]
    if doubled := sorted({title for title in titles if titles.count(title) > 1}):
        raise UserError(f"--benchmark {doubled[0]}: named twice; name it once (a file of your own may give a name)")
    _check_same(runs)
    if runs[0].task is None:  # tasks leave it to the command that started them
        _name_ignored(runs)
    if runs[0].early_exit() is not None and all(run.scoring != "generate" for run in runs):
        raise UserError("--exit-criterion is for tokens that are generated, and here all are scored: omit it")


def _name_ignored(runs: Sequence[EvaluateOptions]) -> None:
    """Warn of options without effect, once for all benchmarks that ignore the same."""
    titles: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        titles.setdefault(tuple(run.ignored()), []).append(run.title)
    for options, own in titles.items():
        if options:
            logger.warning(f"{shown(first_few(own, 3))}: without effect here: {', '.join(options)}")


def _check_same(runs: Sequence[EvaluateOptions]) -> None:
    """Raise UserError where benchmarks disagree on what is one for all of them, such as the engine."""
    first = runs[0]
    for name in (each.name for each in fields(EvaluateOptions) if each.name not in _OF_ONE):
        for run in runs[1:]:
            if (given := getattr(run, name)) != (others := getattr(first, name)):
                raise UserError(
                    f"--{name.replace('_', '-')} is {shown(str(others))} for {first.title} and {shown(str(given))} for "
                    f"{run.title}, but one for all benchmarks: give it on the command line"
                )


def _read_all(runs: Sequence[EvaluateOptions]) -> list[ProblemSet]:
    """The problems of all benchmarks. Raises UserError with a line for each benchmark that cannot be asked."""
    sets, problems = [], []
    for run in runs:
        try:
            sets.append(read_problem_set(run, run.data_dir))
            if run.scoring != "perplexity":
                _check_references(run, sets[-1].problems)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return sets


def _check_references(run: EvaluateOptions, problems: Sequence[Problem]) -> None:
    grader = Grader(run.rules())
    for problem in problems:
        if grader.reference(problem.answer, problem.choices) is None:
            raise UserError(
                f"{problem.where}: the reference answer {str(problem.answer)[:60]!r} cannot be read; "
                "fix it or choose another --answer-type"
            )


def _evaluations(both: Sequence[tuple[EvaluateOptions, ProblemSet]]) -> Iterator[Evaluation]:
    first = both[0][0]
    # Takes seconds, most of them for transformers.
    logger.info(f"loading libraries and the tokenizer of {shown(first.tokenizer or first_few(first.model, 3))}")
    ignores_template = not any(run.chat or run.scoring == "perplexity" for run, _ in both)
    for model, arms in itertools.groupby(plan_arms(first), key=lambda arm: arm.model):
        tokenizer = load_tokenizer(first.tokenizer or model)
        if tokenizer.chat_template is not None and ignores_template:
            logger.info("note: the model has a chat template, which is not applied: --chat does so")
        texts = [render_prompts(tokenizer, [each.prompt for each in own.problems], run) for run, own in both]
        for arm in arms:
            for (run, own), prompts in zip(both, texts, strict=True):
                yield Evaluation(arm, run, own, Store(run.output / arm.folder / run.title), tokenizer, prompts)


def _conclude(evaluations: Sequence[Evaluation], options: EvaluateOptions) -> list[ModelResult]:
    """Grade what is not graded, and write the results."""
    answered = [each for each in evaluations if not each.has_documents]
    graded = [_graded(each) for each in answered]
    results = [summarize(each, samples, _path(each)) for each, samples in zip(answered, graded, strict=True)]
    documents = [_documents(each) for each in evaluations if each.has_documents]
    write_results(options.output, evaluations, graded, results, documents)
    for each, result in zip(answered, results, strict=True):
        logger.info(describe(result, is_scored=each.is_scored))
    for one in documents:
        logger.info(describe_documents(one))
    logger.info(f"report: {shown(options.output / 'report.md')}, {shown(options.output / 'report.html')}")
    failed = sum(result.failed_requests for result in results) + sum(one.failed_requests for one in documents)
    if failed:
        raise Fault(f"{counted(failed, 'request')} failed, counted as wrong; the same command asks again")
    return results


def _graded(each: Evaluation) -> list[Sample]:
    """The samples of an evaluation with all its answers; graded, unless they are as the options say."""
    answers = each.answers()
    require_complete(answers, each.keys, rescore=each.options.rescore)
    before = each.store.samples()
    settings = grading_of(each.options)
    is_graded = len(before) == len(each.keys) and not each.store.has_journals()
    if is_graded and each.store.grading().get("settings") == settings and not each.options.rescore:
        return before
    samples = grade(each, answers)
    package = environment()["package"]
    each.store.finish(samples, {"settings": settings, "versions": grading_versions(), "package": package})
    if each.options.rescore:
        _note_rescored(each, before, samples)
    return samples


def _documents(each: Evaluation) -> DocumentResult:
    """The figures of an evaluation of documents with all its likelihoods."""
    answers = each.answers()
    require_complete(answers, each.keys, rescore=each.options.rescore)
    ordered = [answers[key] for key in each.keys]
    if each.store.has_journals():
        each.store.finish(ordered)
    return summarize_documents(each.arm, each.options.title, each.texts, ordered, _path(each))


def _path(each: Evaluation) -> str:
    """The file with its samples, relative to results.json."""
    return str(each.store.samples_path.relative_to(each.options.output))


def grade(each: Evaluation, answers: Mapping[Key, Answer]) -> list[Sample]:
    """The graded samples, by problem and number."""
    ordered = [answers[key] for key in each.keys]
    problem_of = {problem.id: (problem, text) for problem, text in zip(each.problems, each.texts, strict=True)}
    asked = [answer for answer in ordered if answer.finish_reason != FAILED]
    items = [_item(answer, *problem_of[answer.id]) for answer in asked]
    with GraderPool(each.options.rules()) as pool:
        grades = dict(zip((answer.key for answer in asked), pool.grade(items), strict=True))
    return [_sample(answer, problem_of[answer.id][0], grades.get(answer.key)) for answer in ordered]


def _item(answer: Answer, problem: Problem, text: str) -> Item:
    return Item(answer.output, problem.answer, problem.choices, opens_thinking(text), problem.code_prefix)


def _sample(answer: Answer, problem: Problem, grade: Grade | None) -> Sample:
    return Sample(
        **{each.name: getattr(answer, each.name) for each in fields(Answer)},
        prompt=problem.prompt,
        extracted=grade.extracted if grade else None,
        reference=_kept(problem.answer),
        correct=grade.correct if grade else False,
        tier=grade.tier if grade else None,
        reason=grade.reason if grade else "request failed",
        detail=grade.detail if grade else answer.failure,
    )


def _kept(reference: Any) -> Any:
    """A reference as a sample keeps it: of long tests the digest, since they may be larger than all else together."""
    if isinstance(reference, str) and len(reference) > _MAX_REFERENCE:
        return f"sha256:{hashlib.sha256(reference.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return reference


def _note_rescored(each: Evaluation, before: Sequence[Sample], after: Sequence[Sample]) -> None:
    """Keep the new settings of grading, and say which grades changed."""
    settings = read_settings(each.store.settings_path) or {}
    write_json(each.store.settings_path, settings | {"grading": grading_of(each.options)})
    old = {sample.key: sample for sample in before}
    changed = [(old[new.key], new) for new in after if new.key in old and old[new.key].correct != new.correct]
    name = f"{shown(label(each.arm.model, each.arm.recurrences))}, {each.options.title}"
    logger.info(f"{name}: {len(changed):,} of {len(after):,} grades changed")
    for was, now in changed[:_SHOWN_CHANGES]:
        words = [f"{sample.extracted!s:.60} {'right' if sample.correct else 'wrong'}" for sample in (was, now)]
        logger.info(f"  {shown(f'{now.id}, sample {now.sample}: was {words[0]}, now {words[1]}')}")
