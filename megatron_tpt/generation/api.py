"""What thinking, evaluation and rollouts ask of an engine. Light to import.

Every engine completes prompts. What only some of them can do is an `Ability`: an engine declares its own, and a caller
names those that it needs when it opens one (`open_engine`).
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from annotated_types import Ge, Gt, Le

from megatron_tpt.config.fields import NonNegativeInt, PositiveFloat, PositiveInt, Share, check_bounds
from megatron_tpt.errors import Fault, UserError
from megatron_tpt.generation.request_fields import LengthField, OmittableField, check_request_fields, check_url
from megatron_tpt.names import seed_of

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]
EngineKind = Literal["vllm", "vllm-server", "endpoint", "transformers"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Api = Literal["completions", "chat"]
Temperature = Annotated[float, Ge(0), Le(2)]
TopP = Annotated[float, Gt(0), Le(1)]
ExitCriterion = Literal["state", "entropy", "kl"]
WeightTransfer = Literal["folder", "nccl", "ipc"]
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Ability = Literal["log-probabilities", "log-likelihood", "update_weights"]
"""What an engine may be able to do in addition to completing prompts:

- "log-probabilities" of the tokens that it samples (`Sampling.log_probabilities`);
- "log-likelihood" of tokens that it is given (`Engine.score`): choices, documents, prompts;
- "update_weights": other weights for the model that runs (`Engine.update_weights`).
"""
ABILITIES: Mapping[EngineKind, frozenset[Ability]] = {
    "vllm": frozenset({"log-probabilities", "log-likelihood", "update_weights"}),
    "vllm-server": frozenset({"log-probabilities", "log-likelihood", "update_weights"}),
    "endpoint": frozenset({"log-probabilities", "log-likelihood", "update_weights"}),
    "transformers": frozenset({"log-probabilities", "log-likelihood", "update_weights"}),
}
"""What each kind of engine can do at most; `Engine.abilities` says what the one that runs can do."""
_CONDITIONS: Mapping[EngineKind, str] = {
    "vllm": "only on a CPU, in this process: with tensor_parallel_size 1",
    "vllm-server": "only with a weight_transfer",
    "endpoint": "only where vLLM serves the model, as its list of models says (update_weights: with a weight_transfer)",
}


class EngineError(Fault):
    """The engine as a whole cannot continue: no server answers, or its process died and does not start again."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to end. The defaults are those of thinking generation."""

    temperature: Temperature = 0.6
    """0 takes the likeliest token."""
    top_p: TopP = 0.9
    max_new_tokens: PositiveInt = 8192
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it. The end-of-sequence token always ends it."""
    seed: int | None = None
    """With a seed, a request's random numbers are its own: they do not depend on the requests around it."""
    log_probabilities: bool = False
    """Whether to return the log-probability of every sampled token, see `Completion.log_probabilities`."""

    def __post_init__(self) -> None:
        check_bounds(self)


class Request(NamedTuple):
    """One prompt and how to continue it."""

    prompt: Prompt
    """Text, token ids, or the messages of a chat: `[{"role": "user", "content": "..."}]`."""
    sampling: Sampling
    key: Any = None
    """Whatever the caller wants back with the completion."""


class ScoringRequest(NamedTuple):
    """A continuation whose likelihood after its context is asked for, both as token ids.

    A model predicts a token from those before it, so the first token of a sequence has no log-probability and the
    context must not be empty. Three usual forms:

    - a choice: the question and the choice, see `encode_pair`;
    - a document from its first token on: the begin-of-sequence token (or the end-of-sequence token, which stands
      between documents in pre-training) and the document, see `rolling_requests`;
    - a prompt: its first token and all others.
    """

    context: Sequence[int]
    continuation: Sequence[int]
    key: Any = None
    """Whatever the caller wants back with the likelihood."""


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after a prompt."""

    text: str
    """With special tokens shown (where the engine can), without the stop text or the end-of-sequence token."""
    token_ids: tuple[int, ...]
    """All that was generated, the token that ended it included; empty where the engine does not report it."""
    finish_reason: FinishReason
    """"length": truncated at `max_new_tokens` or at the engine's context."""
    num_prompt_tokens: int
    num_tokens: int
    """Generated tokens, the one that ended the completion included."""
    reasoning: str | None = None
    """What a server with a reasoning parser returns apart from the text."""
    log_probabilities: tuple[float, ...] | None = None
    """Where they were asked for: the natural logarithm of every token's probability in the distribution that it was
    drawn from, after temperature and top-p; for temperature 0 in that of temperature 1. As long as `token_ids`.
    """
    weight_version: int = 0
    """That of the weights that wrote it, see `Engine.weight_version`."""
    depths: tuple[int, ...] | None = None
    """With `EngineOptions.early_exit`: the iterations after which every token was chosen. As long as `token_ids`."""


@dataclass(frozen=True)
class LogLikelihood:
    """How likely a model finds a continuation."""

    log_probabilities: tuple[float, ...]
    """Natural logarithms, one for every token of the continuation, at temperature 1."""
    is_greedy: bool
    """Whether no token of the vocabulary is likelier than the continuation's, at any of its positions."""
    num_prompt_tokens: int
    """Those of context and continuation together."""
    weight_version: int = 0
    """That of the weights that scored it, see `Engine.weight_version`."""

    @property
    def total(self) -> float:
        """The log-likelihood of the whole continuation."""
        return math.fsum(self.log_probabilities)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token."""
        return math.exp(-self.total / len(self.log_probabilities))


@dataclass(frozen=True)
class Failure:
    """One request that cannot be completed; the others continue."""

    reason: str
    """A short, stable code: "prompt_too_long", "bad_request", "content_filter", "timeout", "connection",
    "server_error", "invalid_response".
    """
    message: str


@dataclass
class EngineStats:
    """What an engine has done so far."""

    num_sent: int = 0
    """Attempts: every retry counts again."""
    num_finished: int = 0
    """Requests that ended in a Completion or a LogLikelihood."""
    num_retried: int = 0
    num_failed: int = 0
    """Requests that ended in a Failure."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, outcome: Completion | LogLikelihood | Failure) -> None:
        """Add the end of one request."""
        if isinstance(outcome, Failure):
            self.num_failed += 1
            return
        self.num_finished += 1
        self.prompt_tokens += outcome.num_prompt_tokens
        if isinstance(outcome, Completion):
            self.completion_tokens += outcome.num_tokens


class DescribedWeights(Protocol):
    """Weights that are described before they are gathered."""

    def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]": ...

    def metadata(self) -> "Sequence[tuple[str, torch.dtype, tuple[int, ...]]]":
        """Name, dtype and shape of every tensor, in the order of the iteration."""
        ...


class Engine(Protocol):
    """A model that completes prompts, and can do what its `abilities` say."""

    num_devices: int
    """GPUs (or CPUs) that it computes on; a server elsewhere counts as one."""
    weight_version: int
    """0 for the weights that it was opened with, then the `version` given to `update_weights`."""
    dtype: str | None
    """What it computes in, such as "float32"; None where a server does not report it."""

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can do in addition to `generate`."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt and completion together, in tokens; None where a server does not report it."""
        ...

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        """End each of `requests` exactly once, in the order in which they finish.

        The requests are taken lazily, a bounded number ahead, so that an endless source keeps the engine full.
        Leaving the loop early abandons what is in flight. One loop runs at a time, of `generate` or `score`. Raises
        EngineError when the engine as a whole cannot continue, and UserError for log-probabilities that it does not
        have.
        """
        ...

    def score(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood | Failure]]:
        """The log-likelihood of every continuation, under the terms of `generate`. Ability: "log-likelihood".

        Nothing is ever truncated: context and continuation, with room for one more token, must fit into
        `max_model_len`; else the request ends in the Failure "prompt_too_long".
        """
        ...

    def update_weights(self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """Replace all weights of the model. Ability: "update_weights".

        `weights` are the tensors of the model's folder, whole, under their names there (Hugging Face's), each exactly
        once; for the transfers "nccl" and "ipc" also a `DescribedWeights`. `version` becomes `weight_version`, and that
        of everything computed from now on; nothing that was cached with the old weights is used again. Raises
        EngineError while requests are in flight, and for weights that are missing or unknown; after the latter the
        engine must not be used.
        """
        ...

    def stats(self) -> EngineStats:
        """A copy of the counts since the engine was opened."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class EarlyExit:
    """When a generated token of a recurrent model takes no further iteration."""

    criterion: ExitCriterion
    """What must be below the threshold: the relative change of its state ("state"), the entropy of the distribution of
    the next token ("entropy"), or its divergence from the one after the iteration before ("kl"), both in nats.
    """
    threshold: PositiveFloat

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class EngineOptions:
    """Which model to run, and where."""

    model: str
    """A Hugging Face model folder or a Hub id (owner/name); for "endpoint", the name under which it is served."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together, in tokens; by default what the model was made for."""
    dtype: DType = "auto"
    """Number format of the model; "auto" is what its config.json says, or float32 on a CPU without instructions for
    that."""
    tensor_parallel_size: PositiveInt = 1
    """Number of devices that share the model."""
    max_num_seqs: PositiveInt | None = None
    """Most requests computed at once (by each server, where there are several); by default 256 on CPUs and vLLM's
    own choice on GPUs, 64 for every endpoint, 8 for "transformers".
    """
    num_recurrences: PositiveInt | None = None
    """Iterations over the recurrent layers of a recurrent model; by default what its config.json says."""
    early_exit: EarlyExit | None = None
    """When generated tokens of a recurrent model take fewer iterations; only "transformers" can."""
    kind: EngineKind = "vllm"
    """"vllm" in this process; "vllm-server": vLLM servers, started here, one for every group of GPUs; "endpoint":
    servers that run already and speak OpenAI's protocol; "transformers": slow, where vLLM cannot be installed.
    """
    num_engines: PositiveInt | None = None
    """Servers to start for "vllm-server"; by default as many as the visible GPUs have room for, one on a CPU."""
    endpoints: tuple[str, ...] = ()
    """Base URLs for "endpoint", such as http://host:8000/v1; requests are shared among them."""
    api: Api = "completions"
    """What servers are asked: "completions" takes prompts as text or token ids, "chat" takes messages."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key for the endpoints; without it no key is sent."""
    request_fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the caller's own in every request to an endpoint; they win over what is sent to vLLM by default."""
    length_field: LengthField = "max_tokens"
    """The request field in which endpoints get `Sampling.max_new_tokens`."""
    omit_fields: tuple[OmittableField, ...] = ()
    """Fields of a request that endpoints are not sent, as some models refuse them."""
    request_timeout_s: PositiveFloat = 1800.0
    """A request that takes longer is abandoned and retried."""
    max_retries: NonNegativeInt = 5
    """How often a request is retried after an unusable answer, while others are completed. Servers that cannot be
    reached or are overloaded do not count: they are waited for.
    """
    endpoint_patience_s: PositiveFloat = 600.0
    """When no endpoint has answered for this long, generation ends with an error."""
    hang_timeout_s: PositiveFloat = 600.0
    """A server of "vllm-server" that has requests, and has written no token for this long, is ended and restarted."""
    log_dir: Path | None = None
    """The folder for the logs of the servers that "vllm-server" starts; by default a temporary one."""
    gpu_memory: Share | None = None
    """The share of each GPU's memory that the servers of "vllm-server" take; by default vLLM's choice."""
    weight_transfer: WeightTransfer | None = None
    """How servers get other weights, see server_weights.py; by default they get none."""
    weights_dir: Path | None = None
    """Where the transfer "folder" writes; servers must see it under the same path."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.kind == "endpoint" and not self.endpoints:
            raise UserError("no endpoint was given; name one or more, such as --endpoints http://host:8000/v1")
        if self.kind != "endpoint" and self.endpoints:
            raise UserError(f'endpoints were given for the engine "{self.kind}"; choose "endpoint", or omit them')
        for url in self.endpoints:
            check_url(url)
        if self.kind == "endpoint" and self.num_recurrences is not None:
            raise UserError(
                f'num_recurrences={self.num_recurrences} cannot be chosen for the engine "endpoint": its servers were '
                f"started with a number of their own; omit it"
            )
        if self.kind != "transformers" and self.early_exit is not None:
            raise UserError(f'the engine "{self.kind}" has no early exit; omit it, or choose "transformers"')
        if self.kind != "endpoint" and (self.request_fields or self.omit_fields or self.length_field != "max_tokens"):
            raise UserError(f'request fields can be chosen for the engine "endpoint", not for "{self.kind}"')
        if self.weight_transfer == "folder" and self.weights_dir is None:
            raise UserError('the weight_transfer "folder" needs a weights_dir')
        check_request_fields(self.request_fields, is_chat=self.api == "chat")


def check_abilities(kind: EngineKind, needs: Collection[Ability], abilities: frozenset[Ability]) -> None:
    """Raise UserError unless an engine of `kind` with `abilities` has all that the caller needs; the message names
    engines that do."""
    for ability in needs:
        if ability not in abilities:
            raise lacking(kind, ability)


def possible_abilities(options: EngineOptions) -> frozenset[Ability]:
    """What the engine can do at most: servers are started for updates of their weights, or not."""
    has_no_updates = options.kind in ("vllm-server", "endpoint") and options.weight_transfer is None
    return ABILITIES[options.kind] - ({"update_weights"} if has_no_updates else frozenset())


def lacking(kind: EngineKind, ability: Ability) -> UserError:
    """The error of an engine that is asked for what it does not have."""
    condition = f"has {ability} {_CONDITIONS[kind]}" if ability in ABILITIES[kind] else f"has no {ability}"
    others = [f'"{other}"' for other, abilities in ABILITIES.items() if ability in abilities and other != kind]
    choice = f"; choose the engine {' or '.join(others)}" if others else ""
    return UserError(f'the engine "{kind}" {condition}{choice}')


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for the request called `names`, the same wherever and whenever it is asked (63 bits)."""
    return seed_of(repr((seed, *names)))


def complete(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
    """The completions of `prompts`, in their order; a seed in `sampling` gives each prompt a seed of its own.

    Raises EngineError for a prompt that cannot be completed.
    """

    def sampling_of(i: int) -> Sampling:
        return sampling if sampling.seed is None else replace(sampling, seed=derive_seed(sampling.seed, i))

    requests = (Request(prompt, sampling_of(i), key=i) for i, prompt in enumerate(prompts))
    done = {request.key: expect_completion(outcome) for request, outcome in engine.generate(requests)}
    return [done[i] for i in range(len(prompts))]


def expect_completion[T: (Completion, LogLikelihood)](outcome: T | Failure) -> T:
    """`outcome`, for callers that need every one; raises EngineError for a Failure."""
    if isinstance(outcome, Failure):
        raise EngineError(f"a request could not be completed: {outcome.message} ({outcome.reason})")
    return outcome
