"""Tasks of lm-evaluation-harness on our engines: generation, log-likelihood and perplexity.

    from lm_eval import simple_evaluate
    from megatron_tpt.evaluation.lm_eval_bridge import EngineLM, local_tasks

    with open_engine(EngineOptions("DIR", max_model_len=4096), ["log-likelihood"]) as engine:
        lm = EngineLM(engine, load_tokenizer("DIR"))
        print(simple_evaluate(lm, tasks=["boolq_local"], task_manager=local_tasks("tasks/"))["results"])

Needs the extra `lm-eval`. Nothing is shortened: a request that does not fit into the context is an error.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Engine,
    LogLikelihood,
    Request,
    Sampling,
    ScoringRequest,
    begin_ids,
    derive_seed,
    document_log_likelihoods,
    encode_pair,
    expect_completion,
    log_likelihoods,
    prefix_id,
    render_chat,
)

try:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"lm-evaluation-harness cannot be imported ({error}): pip install megatron-tpt[lm-eval]") from error

_KNOWN = {"until", "max_gen_toks", "temperature", "top_p", "do_sample"}
DEFAULT_MAX_NEW_TOKENS = 256
"""Of tasks that do not say; the harness's own."""


def local_tasks(folder: str | Path) -> TaskManager:
    """The tasks in a folder of YAML files alone: the harness reads its own 14,000 names in 40 seconds."""
    return TaskManager(include_path=str(folder), include_defaults=False)


class EngineLM(LM):
    """A model of lm-evaluation-harness that is one of our engines."""

    def __init__(self, engine: Engine, tokenizer: Any, seed: int = 0) -> None:
        """Every sampled completion has a seed of its own, from `seed`, its prompt and its number."""
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer
        self._seed = seed

    @property
    def tokenizer_name(self) -> str:
        """What the harness keys its caches of chats by."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template, for the harness's records."""
        return self._tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `LM.apply_chat_template`."""
        return render_chat(self._tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`."""

        def asked() -> Iterator[Request]:
            begin = begin_ids(self._tokenizer)
            repeats: collections.Counter[str] = collections.Counter()  # several samples are the same request again
            for i, request in enumerate(requests):
                context, given = request.args
                ids = begin + self._tokenizer(context, add_special_tokens=False).input_ids
                sampling = sampling_of(given)
                self._check_room(ids, sampling.max_new_tokens)
                yield Request(ids, replace(sampling, seed=derive_seed(self._seed, context, repeats[context])), key=i)
                repeats[context] += 1

        texts = {request.key: expect_completion(outcome).text for request, outcome in self._engine.generate(asked())}
        return [texts[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        likelihoods: list[LogLikelihood] = log_likelihoods(self._engine, map(self._pair, requests))
        return [(one.total, one.is_greedy) for one in likelihoods]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`."""
        documents = [self._tokenizer(request.args[0], add_special_tokens=False).input_ids for request in requests]
        likelihoods = document_log_likelihoods(self._engine, documents, prefix_id(self._tokenizer))
        return [one.total for one in likelihoods]

    def _pair(self, request: Any) -> ScoringRequest:
        context, continuation = request.args
        pair = encode_pair(self._tokenizer, context, continuation)
        begin = begin_ids(self._tokenizer) if context.rstrip() else []
        return pair._replace(context=[*begin, *pair.context])

    def _check_room(self, ids: Sequence[int], max_new_tokens: int) -> None:
        context = self._engine.max_model_len
        if context is not None and len(ids) + max_new_tokens > context:
            raise UserError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones do not fit into the engine's context of "
                f"{context}: open it with a larger max_model_len, or lower max_gen_toks of the task"
            )


def sampling_of(given: dict[str, Any]) -> Sampling:
    """The sampling that `generation_kwargs` of a task ask for. Raises UserError for what the engines do not have."""
    if unknown := sorted(given.keys() - _KNOWN):
        raise UserError(f"generation_kwargs {', '.join(unknown)}: not known here; remove them from the task")
    until = given.get("until") or []
    is_sampled = bool(given.get("do_sample", float(given.get("temperature") or 0) > 0))
    return Sampling(
        temperature=float(given.get("temperature") or 0) if is_sampled else 0.0,
        top_p=float(given.get("top_p", 1.0)),
        max_new_tokens=int(given.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS)),
        stop=tuple([until] if isinstance(until, str) else until),
    )
