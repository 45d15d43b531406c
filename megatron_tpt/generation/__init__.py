"""Text generation: four engines behind one protocol.

    with open_engine(EngineOptions(model="DIR", max_model_len=2048)) as engine:
        for request, outcome in engine.generate(requests):   # in the order in which they finish
            ...

`vllm` runs vLLM in this process, `vllm-server` starts vLLM servers (one for every group of GPUs), `endpoint` asks
servers that run already, `transformers` is for machines where vLLM cannot be installed. Light to import.
"""

import contextlib
from collections.abc import Iterator

from megatron_tpt.generation.api import (
    Completion,
    DType,
    Engine,
    EngineError,
    EngineKind,
    EngineOptions,
    EngineStats,
    Failure,
    FinishReason,
    Prompt,
    Request,
    Sampling,
    Temperature,
    TopP,
    complete,
    derive_seed,
    expect_completion,
)
from megatron_tpt.generation.models import (
    begin_ids,
    check_context,
    check_model,
    load_model_config,
    load_tokenizer,
    render_chat,
)
from megatron_tpt.generation.vllm_engine import VLLMEngine

__all__ = [
    "Completion",
    "DType",
    "Engine",
    "EngineError",
    "EngineKind",
    "EngineOptions",
    "EngineStats",
    "Failure",
    "FinishReason",
    "Prompt",
    "Request",
    "Sampling",
    "Temperature",
    "TopP",
    "VLLMEngine",
    "begin_ids",
    "check_context",
    "check_model",
    "complete",
    "derive_seed",
    "expect_completion",
    "load_model_config",
    "load_tokenizer",
    "open_engine",
    "render_chat",
]


@contextlib.contextmanager
def open_engine(options: EngineOptions) -> Iterator[Engine]:
    """The engine that `options` describe, closed at the end of the block. Raises UserError or
    EngineError when it cannot start."""
    engine = _start(options)
    try:
        yield engine
    finally:
        engine.close()


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
