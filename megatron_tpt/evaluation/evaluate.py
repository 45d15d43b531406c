"""Evaluating: every model answers every problem and scores every document, one model after another in this process.

OUTPUT/results.json            accuracy of every model with its standard error, perplexity, and the settings
OUTPUT/<model>/samples.jsonl   every output, what was read from it, and whether it is right
OUTPUT/<model>/r4/...          the same of a recurrent model at each of several numbers of iterations,
OUTPUT/recurrences.md, .png    and these side by side
"""

import collections
import json
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import to_dict
from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import Arm, plan_arms
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.perplexity import DocumentScore, score_documents, window_of
from megatron_tpt.evaluation.problems import Problem, read_documents, read_problems
from megatron_tpt.evaluation.recurrences import Point, unrolled_parameters, write_report
from megatron_tpt.files import atomic_write, write_json
from megatron_tpt.generation import (
    Completion,
    Engine,
    EngineOptions,
    Request,
    begin_ids,
    check_context,
    check_model,
    derive_seed,
    expect_completion,
    load_tokenizer,
    open_engine,
    render_chat,
    weight_shapes,
)
from megatron_tpt.grading import Grade, Grader, GraderPool, Item, opens_thinking
from megatron_tpt.names import shown

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One answer of a model to one problem: a line of samples.jsonl."""

    id: str
    sample: int
    """Its number among the answers to this problem, from 0."""
    prompt: str
    output: str
    extracted: str | None
    """The answer as it was read; None when none was found."""
    reference: Any
    """As the row has it: text, number, boolean or a list of them."""
    correct: bool
    finish_reason: str
    output_tokens: int
    tier: str | None = None
    """What decided that the answer is right: "text", "number", "math-verify" or "tests"."""
    reason: str | None = None
    """Why it is wrong: "no answer", "thinking not closed", "different", "failed", "time-out" or "crash"."""
    detail: str = ""
    """More on the reason, such as the exception of a program."""


@dataclass(frozen=True)
class ModelResult:
    """What one model reached."""

    model: str
    accuracy: float
    """Mean over problems of the share of right samples (pass@1)."""
    stderr: float | None
    """Standard error of `accuracy` over the problems; None for a single problem."""
    num_problems: int
    num_samples: int
    """Samples per problem."""
    extraction_failures: int
    """Samples without a readable answer; they count as wrong."""
    mean_output_tokens: float
    truncated_fraction: float
    """Share of samples truncated at `max_new_tokens`."""
    output_tokens_per_s: float
    samples: str
    """The file with the samples, relative to results.json."""
    unclosed_thinking: int = 0
    """Samples whose thinking never ended; they are among `extraction_failures`."""
    grading_timeouts: int = 0
    """Samples whose grading, or whose code, took too long; they count as wrong."""
    grading_crashes: int = 0
    """Samples whose grading, or whose code, crashed; they count as wrong."""
    recurrences: int | None = None
    """Iterations of a recurrent model."""
    depths: dict[int, int] = field(default_factory=dict)
    """With early exit: generated tokens by the iterations that they took."""
    mean_depth: float | None = None
    """The mean of `depths`."""


@dataclass(frozen=True)
class Measured:
    """What an arm reached."""

    arm: Arm
    problems: ModelResult | None
    documents: DocumentScore | None


def evaluate(options: EvaluateOptions) -> list[ModelResult]:
    """Do what `tools/evaluate.py` does. Raises UserError for what the user can fix, before any model is loaded."""
    grader = Grader(options.rules())
    problems, documents = read_problems(options), read_documents(options)
    for problem in problems:
        _check_reference(problem, grader)
    for model in options.model:
        check_model(model)
    measured = [_measure(arm, problems, documents, options) for arm in plan_arms(options)]
    results = [one.problems for one in measured if one.problems is not None]
    points = [_point(one, options) for one in measured] if options.depths() else []
    _write_results(options, measured, points)
    if points:
        write_report(options.output, points)
    return results


def _check_reference(problem: Problem, grader: Grader) -> None:
    if grader.reference(problem.answer, problem.choices) is None:
        raise UserError(
            f"{problem.where}: the reference answer {str(problem.answer)[:60]!r} cannot be read; "
            "fix it or choose another --answer-type"
        )


def _measure(arm: Arm, problems: Sequence[Problem], documents: Sequence[str], options: EvaluateOptions) -> Measured:
    """Have one arm answer all problems and score all documents, and write its samples."""
    tokenizer = load_tokenizer(arm.model)
    texts = render_prompts(tokenizer, [problem.prompt for problem in problems], options) if problems else []
    prompts = encode_prompts(tokenizer, texts, options)
    window = window_of(arm.model, options.document_window) if documents else 0
    context = check_context(arm.model, max(map(len, prompts)), options.max_new_tokens) if prompts else 0
    score = None
    with open_engine(
        _engine_options(arm, max(context, window), options), needs=["log-likelihood"] if documents else []
    ) as engine:
        if documents:
            score = score_documents(engine, tokenizer, documents, window)
        start = time.monotonic()
        completions = sorted(_complete_all(engine, problems, prompts, options).items())
        generation_s = time.monotonic() - start
        depths = engine.stats().depths
    if score is not None:
        logger.info(_document_line(arm, score))
    if not problems:
        return Measured(arm, None, score)
    samples = _graded(problems, texts, completions, options)
    path = arm.folder / "samples.jsonl"
    _write_samples(options.output / path, samples)
    result = summarize(arm.model, samples, generation_s, str(path))
    if depths:
        result = replace(result, depths=dict(sorted(depths.items())), mean_depth=_mean(depths))
    result = replace(result, recurrences=arm.recurrences)
    logger.info(_line(result))
    return Measured(arm, result, score)


def _engine_options(arm: Arm, context: int, options: EvaluateOptions) -> EngineOptions:
    return EngineOptions(
        arm.model,
        context,
        options.dtype,
        options.tensor_parallel_size,
        options.max_num_seqs,
        num_recurrences=arm.recurrences,
        early_exit=None if arm.recurrences is None else options.early_exit(),
        kind=options.engine,
    )


def _mean(counts: Mapping[int, int]) -> float:
    return sum(value * count for value, count in counts.items()) / sum(counts.values())


def _graded(
    problems: Sequence[Problem],
    texts: Sequence[str],
    completions: Sequence[tuple[tuple[int, int], Completion]],
    options: EvaluateOptions,
) -> list[Sample]:
    """The samples, by problem and number. `texts` are the prompts as they were given to the model."""
    items = [_item(problems[i], completion, opens_thinking(texts[i])) for (i, _), completion in completions]
    with GraderPool(options.rules()) as pool:
        grades = pool.grade(items)
    return [
        _sample(problems[i], j, completion, grade)
        for ((i, j), completion), grade in zip(completions, grades, strict=True)
    ]


def render_prompts(tokenizer: Any, prompts: Sequence[str], options: EvaluateOptions) -> list[str]:
    """The prompts as texts that the model continues: in its chat template, if the options say so."""
    if options.chat:
        if tokenizer.chat_template is None:
            raise UserError(
                f"--chat: {tokenizer.name_or_path} has no chat template: add the one it was trained with "
                f"(chat_template.jinja in its folder), or omit --chat to give the problems as plain text"
            )
        return [render_chat(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    if tokenizer.chat_template is not None:
        logger.info("note: the model has a chat template, which is not applied: --chat does so")
    return list(prompts)


def encode_prompts(tokenizer: Any, texts: Sequence[str], options: EvaluateOptions) -> list[list[int]]:
    """The token ids of rendered prompts; special tokens in them mean what they say: the prompts are ours."""
    begin = begin_ids(tokenizer) if options.begin_token and not options.chat else []
    return [begin + tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def _complete_all(
    engine: Engine, problems: Sequence[Problem], prompts: Sequence[list[int]], options: EvaluateOptions
) -> dict[tuple[int, int], Completion]:
    """Completions by (problem, number of the sample)."""
    sampling = options.sampling()

    def requests() -> Iterator[Request]:
        for i, problem in enumerate(problems):
            for j in range(options.num_samples):
                seed = derive_seed(options.seed, problem.id, j)
                yield Request(prompts[i], replace(sampling, seed=seed), key=(i, j))

    return {request.key: expect_completion(outcome) for request, outcome in engine.generate(requests())}


def _item(problem: Problem, completion: Completion, thinking_opened: bool) -> Item:
    return Item(completion.text, problem.answer, problem.choices, thinking_opened, problem.code_prefix)


def _sample(problem: Problem, number: int, completion: Completion, grade: Grade) -> Sample:
    return Sample(
        id=problem.id,
        sample=number,
        prompt=problem.prompt,
        output=completion.text,
        extracted=grade.extracted,
        reference=problem.answer,
        correct=grade.correct,
        finish_reason=completion.finish_reason,
        output_tokens=completion.num_tokens,
        tier=grade.tier,
        reason=grade.reason,
        detail=grade.detail,
    )


def summarize(model: str, samples: Sequence[Sample], generation_s: float, path: str) -> ModelResult:
    """The figures of one model. Samples of one problem are not independent: the error is taken over problems."""
    by_problem: dict[str, list[bool]] = {}
    for sample in samples:
        by_problem.setdefault(sample.id, []).append(sample.correct)
    rates = [statistics.fmean(correct) for correct in by_problem.values()]
    num_tokens = sum(sample.output_tokens for sample in samples)
    reasons = collections.Counter(sample.reason for sample in samples)
    return ModelResult(
        model=model,
        accuracy=statistics.fmean(rates),
        stderr=statistics.stdev(rates) / len(rates) ** 0.5 if len(rates) > 1 else None,
        num_problems=len(rates),
        num_samples=len(samples) // len(rates),
        extraction_failures=reasons["no answer"] + reasons["thinking not closed"],
        mean_output_tokens=num_tokens / len(samples),
        truncated_fraction=statistics.fmean(sample.finish_reason == "length" for sample in samples),
        output_tokens_per_s=num_tokens / generation_s,
        samples=path,
        unclosed_thinking=reasons["thinking not closed"],
        grading_timeouts=reasons["time-out"],
        grading_crashes=reasons["crash"],
    )


def _line(result: ModelResult) -> str:
    error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
    depth = "" if result.mean_depth is None else f", {result.mean_depth:.2f} iterations per token"
    thinking = f" ({result.unclosed_thinking:,} of them in thinking)" if result.unclosed_thinking else ""
    trouble = "".join(
        f", {count:,} {what}"
        for count, what in ((result.grading_timeouts, "timed out"), (result.grading_crashes, "crashed"))
        if count
    )
    return (
        f"{_shown(result.model, result.recurrences)}: accuracy {result.accuracy:.4f}{error} on "
        f"{result.num_problems:,} problems, "
        f"{result.extraction_failures:,} unreadable{thinking}{trouble}, "
        f"{result.mean_output_tokens:.1f} tokens per answer, "
        f"{result.truncated_fraction:.1%} truncated, {result.output_tokens_per_s:,.0f} tokens/s{depth}"
    )


def _shown(model: str, recurrences: int | None) -> str:
    return shown(model) + ("" if recurrences is None else f", r = {recurrences}")


def _document_line(arm: Arm, score: DocumentScore) -> str:
    return (
        f"{_shown(arm.model, arm.recurrences)}: perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per "
        f"byte on {score.num_documents:,} documents of {score.num_tokens:,} tokens"
    )


def _point(one: Measured, options: EvaluateOptions) -> Point:
    """A row of the report over depths."""
    arm, problems, documents = one.arm, one.problems, one.documents
    flops = options.training_flops[options.model.index(arm.model)] if options.training_flops else None
    return Point(
        model=arm.name,
        recurrences=arm.recurrences,
        unrolled_parameters=unrolled_parameters(weight_shapes(arm.model), arm.recurrences),
        training_flops=flops,
        accuracy=None if problems is None else problems.accuracy,
        stderr=None if problems is None else problems.stderr,
        mean_depth=None if problems is None else problems.mean_depth,
        perplexity=None if documents is None else documents.perplexity,
    )


def _write_samples(path: Path, samples: Sequence[Sample]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")


def _write_results(options: EvaluateOptions, measured: Sequence[Measured], points: Sequence[Point]) -> None:
    settings = {name: value for name, value in to_dict(options).items() if name not in ("model", "output")}
    content = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "models": [asdict(one.problems) for one in measured if one.problems is not None],
    }
    if options.documents is not None:
        content["documents"] = [
            {"model": one.arm.model, "recurrences": one.arm.recurrences, **asdict(one.documents)}
            for one in measured
            if one.documents is not None
        ]
    if points:
        content["recurrences"] = [asdict(point) for point in points]
    write_json(options.output / "results.json", content)
