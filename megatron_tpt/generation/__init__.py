"""Text generation: four engines behind one protocol.

    with open_engine(EngineOptions(model="DIR", max_model_len=2048)) as engine:
        for request, outcome in engine.generate(requests):   # in the order in which they finish
            ...

`vllm` runs vLLM in this process, `vllm-server` starts vLLM servers (one for every group of GPUs), `endpoint` asks
servers that run already, `transformers` is for machines where vLLM cannot be installed. What only some of them can do
(`Ability`) is asked for by `open_engine(options, needs=["log-likelihood"])`, which refuses an engine without it before
it starts. Light to import. May import indexing (chat templates), models (the classes of exports), config and the
single modules; no other stage.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence

from megatron_tpt.generation.api import (
    ABILITIES,
    Ability,
    Api,
    Completion,
    DType,
    EarlyExit,
    Engine,
    EngineError,
    EngineKind,
    EngineOptions,
    EngineStats,
    ExitCriterion,
    Failure,
    FinishReason,
    LogLikelihood,
    Prompt,
    Request,
    Sampling,
    ScoringRequest,
    Temperature,
    TopP,
    check_abilities,
    complete,
    derive_seed,
    expect_completion,
    possible_abilities,
)
from megatron_tpt.generation.likelihood import (
    document_log_likelihoods,
    encode_pair,
    log_likelihoods,
    prefix_id,
    rolling_requests,
)
from megatron_tpt.generation.models import (
    begin_ids,
    check_context,
    check_model,
    is_recurrent,
    load_model_config,
    load_tokenizer,
    render_chat,
    weight_shapes,
)
from megatron_tpt.generation.vllm_engine import VLLMEngine

__all__ = [
    "ABILITIES",
    "Ability",
    "Api",
    "Completion",
    "DType",
    "EarlyExit",
    "Engine",
    "EngineError",
    "EngineKind",
    "EngineOptions",
    "EngineStats",
    "ExitCriterion",
    "Failure",
    "FinishReason",
    "LogLikelihood",
    "Prompt",
    "Request",
    "Sampling",
    "ScoringRequest",
    "Temperature",
    "TopP",
    "VLLMEngine",
    "begin_ids",
    "check_context",
    "check_model",
    "complete",
    "derive_seed",
    "document_log_likelihoods",
    "encode_pair",
    "expect_completion",
    "is_recurrent",
    "load_model_config",
    "load_tokenizer",
    "log_likelihoods",
    "open_engine",
    "prefix_id",
    "render_chat",
    "rolling_requests",
    "servers_apart",
    "weight_shapes",
]


@contextlib.contextmanager
def open_engine(options: EngineOptions, needs: Collection[Ability] = ()) -> Iterator[Engine]:
    """The engine that `options` describe, closed at the end of the block; it has all abilities that the caller `needs`.

    Raises UserError for an engine without one of them, and UserError or EngineError for one that cannot start.
    """
    check_abilities(options.kind, needs, possible_abilities(options))
    engine = _start(options)
    try:
        check_abilities(options.kind, needs, engine.abilities)
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def servers_apart(engine: Engine, place: int = 0, num_places: int = 1) -> Iterator[Sequence[Engine]]:
    """An engine for each server of `engine`, or for this place's share; itself where it has no more than one."""
    from megatron_tpt.generation.endpoint import EndpointEngine

    if not isinstance(engine, EndpointEngine):  # "vllm-server" is a trainer's with one server alone
        yield [engine]
        return
    with engine.apart(place, num_places) as engines:
        yield engines


def _start(options: EngineOptions) -> Engine:
    match options.kind:
        case "vllm":
            return VLLMEngine(options)
        case "vllm-server":
            from megatron_tpt.generation.vllm_server import VLLMServerEngine

            return VLLMServerEngine(options)
        case "endpoint":
            from megatron_tpt.generation.endpoint import EndpointEngine

            return EndpointEngine(options)
        case "transformers":
            from megatron_tpt.generation.transformers_engine import TransformersEngine

            return TransformersEngine(options)
