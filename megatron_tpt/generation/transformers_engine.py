"""Transformers' own `generate`, for machines where vLLM cannot be installed. Slow: a batch waits for its longest.

Every row of a batch draws its noise from its own generator, so that a seeded request does not depend on the
requests around it: the likeliest of log p + Gumbel noise is a sample of p.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatron_tpt.errors import UserError, failure, one_line
from megatron_tpt.generation.api import (
    ABILITIES,
    Completion,
    EngineError,
    EngineOptions,
    EngineStats,
    Failure,
    FinishReason,
    LogLikelihood,
    Request,
    ScoringRequest,
)
from megatron_tpt.generation.cpu import computing_threads, dtype_name
from megatron_tpt.generation.models import (
    check_prompt,
    check_scoring,
    encode_prompt,
    is_recurrent,
    load_tokenizer,
    quiet,
    require_all_weights,
    weight_shapes,
)
from megatron_tpt.generation.vllm_engine import max_model_len
from megatron_tpt.models.spec import register_classes

if TYPE_CHECKING:
    import torch

_DEFAULT_MAX_NUM_SEQS = 8


@dataclass
class _Row:
    """One request of a batch."""

    request: Request
    prompt_ids: list[int]
    max_new_tokens: int
    generator: Any
    """A torch.Generator; None takes the likeliest token."""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    log_probabilities: list[float] = field(default_factory=list)
    """One for every sampled token, where they are asked for."""


class TransformersEngine:
    """AutoModelForCausalLM on one GPU, or on the CPU. Raises UserError for a model that cannot be loaded."""

    num_devices = 1
    abilities = ABILITIES["transformers"]

    def __init__(self, options: EngineOptions) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if options.tensor_parallel_size > 1:
            raise UserError('the engine "transformers" uses one device; omit --tensor-parallel-size')
        self._tokenizer = load_tokenizer(options.model)
        self.max_model_len = max_model_len(options)
        self._batch_size = options.max_num_seqs or _DEFAULT_MAX_NUM_SEQS
        self._stats = EngineStats()
        self.weight_version = 0
        self._is_busy = False
        self._model_name = options.model
        on_cpu = not torch.cuda.is_available()
        name = dtype_name(options, on_cpu=on_cpu)
        dtype = name if name == "auto" else getattr(torch, name)
        is_recurrent(options)  # refuses a depth of other models
        try:
            with quiet(), computing_threads(options, name) if on_cpu else contextlib.nullcontext():
                register_classes(models=True)
                model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        except (OSError, ValueError) as error:
            raise failure(f"{options.model}: this model cannot be loaded ({one_line(error)})", error) from error
        self._model: Any = model.eval().to("cpu" if on_cpu else "cuda")
        self.dtype: str | None = str(model.dtype).removeprefix("torch.")
        if options.num_recurrences is not None:
            self._model.config.num_recurrences = options.num_recurrences
        self._exit: dict[str, Any] = {}
        if options.early_exit is not None:
            leave = options.early_exit
            self._exit = {"exit_criterion": leave.criterion, "exit_threshold": leave.threshold}
        eos = self._model.generation_config.eos_token_id
        self._eos_ids = {self._tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        """See `Engine.generate`. The only Failures are prompts that are empty or leave no room for a completion."""
        with self._busy():
            yield from self._generate(iter(requests))

    def _generate(self, source: Iterator[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        while batch := list(itertools.islice(source, self._batch_size)):
            rows = []
            for request in batch:
                row = self._row(request)
                if isinstance(row, Failure):
                    self._stats.count(row)
                    yield request, row
                else:
                    rows.append(row)
            self._stats.num_sent += len(rows)
            for row, completion in self._complete(rows) if rows else ():
                self._stats.count(completion)
                yield row.request, completion

    def score(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood | Failure]]:
        """See `Engine.score`."""
        with self._busy():
            yield from self._score(iter(requests))

    def _score(self, source: Iterator[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood | Failure]]:
        while batch := list(itertools.islice(source, self._batch_size)):
            accepted = []
            for request in batch:
                refusal = check_scoring(request, self.max_model_len)
                if refusal is None:
                    accepted.append(request)
                else:
                    self._stats.count(refusal)
                    yield request, refusal
            self._stats.num_sent += len(accepted)
            for request, likelihood in self._log_likelihoods(accepted) if accepted else ():
                self._stats.count(likelihood)
                yield request, likelihood

    def _log_likelihoods(self, requests: list[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood]]:
        """Those of one batch."""
        import torch

        rows = [[*request.context, *request.continuation] for request in requests]
        width = max(map(len, rows))
        device = self._model.device
        # Padding follows what is scored, which does not look ahead.
        ids = torch.tensor([row + [self._tokenizer.eos_token_id] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        first = min(len(request.context) for request in requests) - 1  # before it no logits are needed
        with torch.inference_mode():
            kept = torch.arange(first, width - 1, device=device)
            logits = self._model(ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        for request, row, row_logits in zip(requests, rows, logits, strict=True):
            start, end = len(request.context) - 1 - first, len(row) - 1 - first
            log_probabilities = row_logits[start:end].float().log_softmax(-1)
            continuation = torch.tensor(list(request.continuation), device=device)
            own = log_probabilities.gather(-1, continuation[:, None])[:, 0]
            is_greedy = bool((own >= log_probabilities.amax(-1)).all())
            yield request, LogLikelihood(tuple(own.tolist()), is_greedy, len(row), self.weight_version)

    def update_weights(self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """See `Engine.update_weights`."""
        if self._is_busy:
            raise EngineError("weights cannot be updated while requests are in flight: take all their outcomes first")
        known, given = set(weight_shapes(self._model_name)), set()
        for name, tensor in weights:
            given.add(name)
            self._model.load_state_dict({name: tensor}, strict=False)
        require_all_weights(self._model_name, known, given)
        self.weight_version = version

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """Requests are in flight for a `with` block."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False

    def _row(self, request: Request) -> _Row | Failure:
        import torch

        ids = encode_prompt(self._tokenizer, request.prompt)
        failure = check_prompt(ids, self.max_model_len)
        if failure is not None:
            return failure
        sampling = request.sampling
        generator = None
        if sampling.temperature > 0:
            generator = torch.Generator(self._model.device)
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)
        max_new_tokens = min(sampling.max_new_tokens, self.max_model_len - len(ids))
        return _Row(request, ids, max_new_tokens, generator)

    def _complete(self, rows: list[_Row]) -> Iterator[tuple[_Row, Completion]]:
        import torch
        from transformers import GenerationConfig

        width = max(len(row.prompt_ids) for row in rows)
        pad = self._tokenizer.eos_token_id  # masked before the prompts, removed after the completions
        ids = [[pad] * (width - len(row.prompt_ids)) + row.prompt_ids for row in rows]
        mask = [[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows]
        device = self._model.device
        with torch.inference_mode(), self._recorded_depths() as steps:
            output = self._model.generate(
                torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=max(row.max_new_tokens for row in rows), pad_token_id=pad
                ),
                logits_processor=[_Sampler(rows)],
                stopping_criteria=[_Stopper(rows, width, self._eos_ids, self._tokenizer)],
                **self._exit,
            )
        depths = torch.stack(steps, dim=1).tolist() if steps else [None] * len(rows)
        for row, generated, own in zip(rows, output[:, width:].tolist(), depths, strict=True):
            assert row.finish_reason is not None
            taken = None if own is None else tuple(own[: row.num_tokens])
            yield row, replace(self._completion(row, generated[: row.num_tokens]), depths=taken)

    @contextlib.contextmanager
    def _recorded_depths(self) -> "Iterator[list[torch.Tensor]]":
        """The iterations of the tokens that are generated in the block, one tensor [b] for each step; empty where all
        take the same."""
        steps: list[torch.Tensor] = []
        if not self._exit:
            yield steps
            return
        with self._model.register_forward_hook(lambda module, inputs, outputs: steps.append(outputs.depths[:, -1])):
            yield steps

    def _completion(self, row: _Row, ids: list[int]) -> Completion:
        ended = row.finish_reason == "stop" and ids[-1] in self._eos_ids
        text = _decode(self._tokenizer, ids[:-1] if ended else ids)
        text = text.rstrip("\ufffd")  # the beginning of a truncated character
        for stop in row.request.sampling.stop:
            text = text.partition(stop)[0]
        assert row.finish_reason is not None
        log_probabilities = tuple(row.log_probabilities) if row.request.sampling.log_probabilities else None
        return Completion(
            text,
            tuple(ids),
            row.finish_reason,
            len(row.prompt_ids),
            len(ids),
            log_probabilities=log_probabilities,
            weight_version=self.weight_version,
        )

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return replace(self._stats)

    def close(self) -> None:
        """See `Engine.close`."""
        self._model = None


class _Sampler:
    """A logits processor after which the largest score is the sampled token, by each row's own settings."""

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores`: [b, vocabulary]."""
        import torch

        scores = scores.float()
        for i, row in enumerate(self._rows):
            if row.finish_reason is not None:
                continue
            sampling = row.request.sampling
            logits = scores[i].clone()
            if row.generator is not None:
                logits = _keep_top_p(logits / sampling.temperature, sampling.top_p)
                scores[i] = logits - torch.empty_like(logits).exponential_(generator=row.generator).log()
            if sampling.log_probabilities:
                row.log_probabilities.append(float(logits.log_softmax(-1)[scores[i].argmax()]))
        return scores


def _keep_top_p(logits: Any, top_p: float) -> Any:
    """`logits` [vocabulary] with all but the likeliest tokens, which together have `top_p`, at minus infinity."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(0)
    before = probabilities.cumsum(0) - probabilities  # the likeliest has none before it and always stays
    return logits.index_fill(0, order[before >= top_p], float("-inf"))


class _Stopper:
    """Stopping criteria that end every row separately: at an end token, a stop text or its own limit."""

    def __init__(self, rows: list[_Row], width: int, eos_ids: set[int], tokenizer: Any) -> None:
        self._rows = rows
        self._width = width
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self.eos_token_id = sorted(eos_ids)  # by this attribute `generate` knows to fill ended rows with padding

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`input_ids`: [b, s]; which rows have ended: [b]."""
        import torch

        for row, ids in zip(self._rows, input_ids[:, self._width :].tolist(), strict=True):
            if row.finish_reason is None:
                row.num_tokens = len(ids)
                row.finish_reason = self._reason(row, ids)
        return torch.tensor([row.finish_reason is not None for row in self._rows], device=input_ids.device)

    def _reason(self, row: _Row, ids: list[int]) -> FinishReason | None:
        if ids[-1] in self._eos_ids:
            return "stop"
        if row.request.sampling.stop:
            # A token may be a part of one character: as many tokens as the text has bytes, and the one that broke off.
            num_tail = max(len(stop.encode()) for stop in row.request.sampling.stop) + 4
            tail = _decode(self._tokenizer, ids[-num_tail:])
            if any(stop in tail for stop in row.request.sampling.stop):
                return "stop"
        return "length" if len(ids) >= row.max_new_tokens else None


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
