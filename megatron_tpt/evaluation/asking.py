"""Asking: the prompts of the problems as a model sees them, and the answers that are missing.

Nothing is shortened: a prompt that does not fit into the context together with the longest answer is refused before any
model is loaded. A request that fails is noted, and the others continue.
"""

import collections
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import Arm, label
from megatron_tpt.evaluation.choices import continuations
from megatron_tpt.evaluation.options import EvaluateOptions
from megatron_tpt.evaluation.perplexity import window_of
from megatron_tpt.evaluation.problems import Problem, ProblemSet
from megatron_tpt.evaluation.samples import FAILED, Answer, Key, Store, hash_of
from megatron_tpt.generation import (
    Completion,
    Engine,
    Failure,
    LogLikelihood,
    Request,
    ScoringRequest,
    begin_ids,
    check_context,
    derive_seed,
    encode_pair,
    open_engine,
    prefix_id,
    render_chat,
    rolling_requests,
)
from megatron_tpt.grading import after_thinking, opens_thinking
from megatron_tpt.jobs.progress import ProgressLine
from megatron_tpt.names import counted, shown
from megatron_tpt.provenance import environment

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """One benchmark, put to one model at one depth."""

    arm: Arm
    options: EvaluateOptions
    problem_set: ProblemSet
    store: Store
    tokenizer: Any
    texts: list[str]
    """The prompts as the model continues them, in the order of the problems."""

    @property
    def problems(self) -> list[Problem]:
        """What is asked."""
        return self.problem_set.problems

    @property
    def is_scored(self) -> bool:
        """Whether likelihoods are asked for, of options or documents, and nothing is written."""
        return self.options.scoring != "generate"

    @property
    def has_documents(self) -> bool:
        """Whether its problems are documents, which have no answers."""
        return self.options.scoring == "perplexity"

    def __post_init__(self) -> None:
        self.window = 0
        """Tokens that a request of a document may have, see `rolling_requests`."""
        if self.has_documents:
            model = None if self.options.engine == "endpoint" else self.arm.model
            self.window = window_of(model, self.options.document_window)
        self.keys = [
            Key(hash_of(text), problem.id, number)
            for problem, text in zip(self.problems, self.texts, strict=True)
            for number in range(self.options.num_samples)
        ]
        """Of all answers, by problem and number."""

    def answers(self) -> dict[Key, Answer]:
        """Those that are there."""
        return self.store.answers(self.keys)

    def missing(self, task: int = 0, num_tasks: int = 1) -> list[tuple[int, int]]:
        """(problem, number) of the answers in the task's share that are not there, or failed."""
        done = {key for key, answer in self.answers().items() if answer.finish_reason != FAILED}
        places = ((i, j) for i in range(len(self.problems)) for j in range(self.options.num_samples))
        return [
            (i, j) for (i, j), key in zip(places, self.keys, strict=True) if i % num_tasks == task and key not in done
        ]

    def encode(self, text: str) -> list[int]:
        """The token ids of a prompt; special tokens in it mean what they say: the prompts are ours."""
        return self._begin_ids() + self.tokenizer(text, add_special_tokens=False).input_ids

    def _begin_ids(self) -> list[int]:
        """What goes before a prompt; chat templates write it themselves."""
        return begin_ids(self.tokenizer) if self.options.begin_token and not self.options.chat else []

    def scoring_requests(self, i: int) -> list[ScoringRequest]:
        """The options of problem `i`, each after its context; or all tokens of document `i`, each once."""
        if self.has_documents:
            ids = self.tokenizer(self.texts[i], add_special_tokens=False).input_ids
            if not ids:
                raise UserError(f"{self.problems[i].where}: the tokenizer finds no token in this text; remove the row")
            return rolling_requests(ids, prefix_id(self.tokenizer), self.window)
        pairs = continuations(self.options, self.texts[i], self.problems[i].choices)
        begin = self._begin_ids()
        requests = []
        for context, continuation in pairs:
            request = encode_pair(self.tokenizer, context, continuation)
            own = list(request.context)
            requests.append(request._replace(context=own if own == [prefix_id(self.tokenizer)] else [*begin, *own]))
        return requests

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest prompt, and of what comes after it."""
        if self.is_scored:
            requests = (request for i in range(len(self.problems)) for request in self.scoring_requests(i))
            return max(len(request.context) + len(request.continuation) for request in requests), 1
        # The text with the most characters need not be the longest in tokens; all are encoded.
        return max(len(self.encode(text)) for text in self.texts), self.options.max_new_tokens


def render_prompts(tokenizer: Any, prompts: Sequence[str], options: EvaluateOptions) -> list[str]:
    """The prompts as texts that the model continues: in its chat template, if the options say so."""
    if options.chat:
        if tokenizer.chat_template is None:
            raise UserError(
                f"--chat: {tokenizer.name_or_path} has no chat template: add the one it was trained with "
                f"(chat_template.jinja in its folder), or omit --chat to give the problems as plain text"
            )
        return [render_chat(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    return list(prompts)


def check_contexts(evaluations: Sequence[Evaluation]) -> int:
    """The context that the longest prompt and answer need. Raises UserError where a model has less."""
    needed = 0
    for evaluation in evaluations:
        prompt, new = evaluation.longest
        if evaluation.options.engine != "endpoint":  # what a server offers is known when it answers
            try:
                check_context(evaluation.arm.model, prompt, new)
            except UserError as error:
                raise UserError(f"{evaluation.options.title}: {error}") from error
        needed = max(needed, prompt + new)
    return needed


def ask(evaluations: Sequence[Evaluation], task: int, num_tasks: int) -> None:
    """Have one arm answer what is missing of the task's share, and keep each answer as it comes."""
    missing = [evaluation.missing(task, num_tasks) for evaluation in evaluations]
    total = sum(map(len, missing))
    if not total:
        return
    arm, options = evaluations[0].arm, evaluations[0].options
    context = check_contexts(evaluations)
    needs = ["log-likelihood"] if any(evaluation.is_scored for evaluation in evaluations) else []
    name = shown(label(arm.model, arm.recurrences))
    logger.info(f"{name}: loading (engine {options.engine}) for {counted(total, 'answer')}")
    engine_options = options.engine_options(arm.model, context, arm.recurrences, arm.early_exit)
    start_s = time.monotonic()
    with open_engine(engine_options, needs) as engine:  # type: ignore[arg-type]
        if engine.max_model_len is not None and engine.max_model_len < context:
            raise UserError(
                f"{arm.model}: the engine's context is {engine.max_model_len} tokens, but the longest prompt and its "
                f"answer need {context}; lower --max-new-tokens, or for documents --document-window"
            )
        for evaluation, own in zip(evaluations, missing, strict=True):
            if own:
                evaluation.store.note_engine(engine.dtype, _run(options))
        logger.info(f"{name}: loaded in {time.monotonic() - start_s:,.0f} s; answering")
        _Asker(engine, evaluations, missing, task).run()


def _run(options: EvaluateOptions) -> dict[str, Any]:
    """What is to be known of this process, which adds answers. Servers elsewhere do not show their hardware."""
    hardware = {"hardware": None} if options.engine == "endpoint" else {}
    return environment() | hardware | {"tensor_parallel_size": options.tensor_parallel_size}


class _Asker:
    """Sends what is missing, and keeps what comes."""

    def __init__(
        self,
        engine: Engine,
        evaluations: Sequence[Evaluation],
        missing: Sequence[Sequence[tuple[int, int]]],
        task: int,
    ) -> None:
        self._engine = engine
        self._evaluations = evaluations
        self._missing = missing
        self._task = task
        self._total = sum(map(len, missing))
        self._counts: collections.Counter[str] = collections.Counter()
        self._start_s = time.monotonic()

    def run(self) -> None:
        with ProgressLine() as self._line:
            for e, evaluation in enumerate(self._evaluations):
                if self._missing[e]:
                    with evaluation.store.journal(self._task) as journal:
                        for answer in self._scored(e) if evaluation.is_scored else self._written(e):
                            journal.add(answer)
                            self._count(answer)
        logger.info(self._summary())

    def _written(self, e: int) -> Iterator[Answer]:
        evaluation = self._evaluations[e]
        sampling = evaluation.options.sampling()

        def requests() -> Iterator[Request]:
            for i, j in self._missing[e]:
                seed = derive_seed(evaluation.options.seed, evaluation.problems[i].id, j)
                yield Request(evaluation.encode(evaluation.texts[i]), replace(sampling, seed=seed), key=(i, j))

        for request, outcome in self._engine.generate(requests()):
            i, j = request.key
            if isinstance(outcome, Failure):
                yield self._failed(e, i, j, outcome)
            else:
                yield Answer(
                    **_place(evaluation, i, j),
                    output=_text(outcome),
                    finish_reason=outcome.finish_reason,
                    output_tokens=outcome.num_tokens,
                    thinking_tokens=_num_thinking(evaluation, i, outcome),
                    depths={str(r): n for r, n in sorted(collections.Counter(outcome.depths).items())},
                )

    def _scored(self, e: int) -> Iterator[Answer]:
        evaluation = self._evaluations[e]
        found: dict[int, dict[int, LogLikelihood]] = {i: {} for i, _ in self._missing[e]}
        number: dict[int, int] = {}
        failed: set[int] = set()

        def requests() -> Iterator[ScoringRequest]:
            for i in list(found):  # those that are done leave it meanwhile
                own = evaluation.scoring_requests(i)
                number[i] = len(own)
                yield from (request._replace(key=(i, c)) for c, request in enumerate(own))

        for request, outcome in self._engine.score(requests()):
            i, c = request.key
            if not isinstance(outcome, Failure) and not math.isfinite(outcome.total):
                outcome = Failure("invalid_response", f"the log-likelihood is {outcome.total}")
            if isinstance(outcome, Failure):
                if i not in failed:
                    failed.add(i)
                    yield self._failed(e, i, 0, outcome)
                continue
            found[i][c] = outcome
            if len(found[i]) == number[i]:
                own = found.pop(i)
                yield self._likelihoods(evaluation, i, [own[c] for c in range(number[i])])

    @staticmethod
    def _likelihoods(evaluation: Evaluation, i: int, own: Sequence[LogLikelihood]) -> Answer:
        totals = [likelihood.total for likelihood in own]
        scored = Answer(**_place(evaluation, i, 0), output="", finish_reason="scored", log_likelihoods=totals)
        if evaluation.has_documents:
            return replace(scored, output_tokens=sum(len(likelihood.log_probabilities) for likelihood in own))
        return replace(scored, output=likeliest(evaluation.options, evaluation.problems[i].choices, totals))

    def _failed(self, e: int, i: int, j: int, failure: Failure) -> Answer:
        evaluation = self._evaluations[e]
        if not self._counts["failed"]:
            where = f"{evaluation.options.title}, {evaluation.problems[i].where}"
            logger.warning(f"a request failed, others continue: {where}: {failure.message}")
        return Answer(
            **_place(evaluation, i, j),
            output="",
            finish_reason=FAILED,
            failure=f"{failure.reason}: {failure.message}"[:500],
        )

    def _count(self, answer: Answer) -> None:
        self._counts["answers"] += 1
        self._counts["tokens"] += answer.output_tokens
        self._counts["failed"] += answer.finish_reason == FAILED
        self._line.show(self._summary)

    def _summary(self) -> str:
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        counts, arm = self._counts, self._evaluations[0].arm
        failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
        return (
            f"{shown(label(arm.model, arm.recurrences))}: {counts['answers']:,} of {self._total:,} answers{failed}, "
            f"{counts['tokens']:,} tokens, {counts['tokens'] / seconds:,.0f} tokens/s"
        )


def likeliest(options: EvaluateOptions, choices: Sequence[str], totals: Sequence[float]) -> str:
    """The option with the highest log-likelihood, as an output that the grader reads."""
    lengths = [len(choice) if options.normalize_by == "characters" else 1 for choice in choices]
    best = max(range(len(choices)), key=lambda c: totals[c] / max(lengths[c], 1))
    return choices[best] if options.answer_type == "boolean" else f"({chr(ord('A') + best)})"


def _place(evaluation: Evaluation, i: int, j: int) -> dict[str, Any]:
    return {"id": evaluation.problems[i].id, "sample": j, "prompt_hash": hash_of(evaluation.texts[i])}


def _text(completion: Completion) -> str:
    """The whole output, with what a server returned apart put back as thinking."""
    if completion.reasoning is None:
        return completion.text
    return f"<think>{completion.reasoning}</think>{completion.text}"


def _num_thinking(evaluation: Evaluation, i: int, completion: Completion) -> int:
    """How many of the tokens are thinking: all that is not the answer after it."""
    text = _text(completion)
    answer = after_thinking(text, opens_thinking(evaluation.texts[i]))
    if answer is None:
        return completion.num_tokens
    if "</think>" not in text:
        return 0
    own = len(evaluation.tokenizer(answer, add_special_tokens=False).input_ids)
    return max(completion.num_tokens - own - (completion.finish_reason == "stop"), 0)
