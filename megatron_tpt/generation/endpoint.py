"""Servers that speak OpenAI's protocol, one or many: the engine that shares requests among them.

The caller's thread draws the requests; an event loop in a background thread sends them (`dispatch.py`). Each request
comes back exactly once, with its outcome or a Failure.

Only vLLM is trusted with log-probabilities: other servers ignore what they are asked, or round what they return.
"""

import asyncio
import contextlib
import itertools
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import (
    Ability,
    Completion,
    EngineError,
    EngineOptions,
    EngineStats,
    Failure,
    LogLikelihood,
    Request,
    ScoringRequest,
    lacking,
    possible_abilities,
)
from megatron_tpt.generation.dispatch import Dispatcher
from megatron_tpt.generation.http_client import HttpClient
from megatron_tpt.generation.models import check_scoring
from megatron_tpt.generation.openai_api import Outcome
from megatron_tpt.generation.openai_requests import Call, completion_call, scoring_call
from megatron_tpt.generation.server import Job, Results
from megatron_tpt.generation.server_weights import ServerWeights

if TYPE_CHECKING:
    import torch


class EndpointEngine:
    """OpenAI-compatible servers at `options.endpoints`. Starts as soon as one of them answers.

    `local_key`: the servers are our own, on this machine, and take this key. Their starts are watched by others, so
    they are asked often and waited for without limit (`wait_until_open`), and no proxy is between.
    """

    dtype: str | None = None

    def __init__(self, options: EngineOptions, *, local_key: str | None = None) -> None:
        key = local_key or _read_key(options.api_key_env)
        self.weight_version = 0
        self._options = options
        self._is_local = local_key is not None
        self._is_asked = False
        self.num_devices = len(options.endpoints)
        self._stats = EngineStats()
        self._warned_of_usage = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoints", daemon=True)
        self._thread.start()
        self._client = HttpClient(options.request_timeout_s, key, use_proxies=not self._is_local)
        self._dispatcher = Dispatcher(options, self._client, self._stats, is_local=self._is_local)
        self._weights: ServerWeights | None = None
        if options.weight_transfer is not None:
            self._weights = ServerWeights(options, key, is_shared=not self._is_local)
        try:
            self._run(self._dispatcher.start())
            if not self._is_local:
                self.wait_until_open()
        except BaseException:
            self.close()
            raise

    def wait_until_open(self) -> None:
        """Wait until one server can be asked. Raises UserError when none will be."""
        self._run(self._dispatcher.wait_until_open())

    @property
    def abilities(self) -> frozenset[Ability]:
        """See `Engine.abilities`: none unless vLLM is known to serve the model everywhere."""
        if not all(server.listed.is_vllm for server in self._dispatcher.open_servers):
            return frozenset()
        return possible_abilities(self._options)

    @property
    def max_model_len(self) -> int | None:
        """See `Engine.max_model_len`: that of the smallest server, where known."""
        contexts = [server.listed.context for server in self._dispatcher.open_servers]
        return self._options.max_model_len or min((length for length in contexts if length is not None), default=None)

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        """See `Engine.generate`."""
        return self._ended(requests, self._completion_call)

    def score(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood | Failure]]:
        """See `Engine.score`."""
        if "log-likelihood" not in self.abilities:
            raise lacking("endpoint", "log-likelihood")
        return self._ended(requests, self._scoring_call)

    def update_weights(self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """See `Engine.update_weights`; who sends, and how, is said in server_weights.py."""
        if self._weights is None or "update_weights" not in self.abilities:
            raise lacking("endpoint", "update_weights")
        if self._is_asked:
            raise EngineError("weights cannot be updated while requests are in flight: take all their outcomes first")
        self._weights.update(weights, version, self._dispatcher.require_hope)
        self.weight_version = version

    @contextlib.contextmanager
    def apart(self, place: int, num_places: int) -> "Iterator[list[EndpointEngine]]":
        """An engine for each of some servers; those of all places are all servers, some several times if need be."""
        urls = self._options.endpoints
        with contextlib.ExitStack() as stack:
            engines, local_key = [], self._client.key if self._is_local else None
            for url in urls[place % len(urls) :: num_places]:
                one = EndpointEngine(replace(self._options, endpoints=(url,)), local_key=local_key)
                stack.callback(one.close)
                one.weight_version = self.weight_version
                engines.append(one)
            yield engines

    def _completion_call(self, request: Request) -> Call:
        sampling = request.sampling
        if sampling.log_probabilities:
            if "log-probabilities" not in self.abilities:
                raise lacking("endpoint", "log-probabilities")
            reports_weights = self._options.weight_transfer is not None  # so it was started with our arguments
            is_plain = sampling.temperature in (0, 1) and sampling.top_p == 1
            if not (self._is_local or reports_weights or is_plain):
                raise UserError(
                    f"log-probabilities at temperature {sampling.temperature:g} and top-p {sampling.top_p:g}: a server "
                    "does not report whether it takes them before or after temperature and top-p; choose temperature 1 "
                    'and top-p 1, or the engine "vllm", "vllm-server" or "transformers"'
                )
        prompt = request.prompt
        is_ids = not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], Mapping)
        by_tokens = is_ids and self._options.weight_transfer is not None
        return completion_call(request, self._options.api, by_tokens=by_tokens)

    def _scoring_call(self, request: ScoringRequest) -> Call | Failure:
        return check_scoring(request, self.max_model_len) or scoring_call(request)

    def _ended[R](self, requests: Iterable[R], call_of: Callable[[R], Call | Failure]) -> Iterator[tuple[R, Any]]:
        """Every request with its outcome; a request that `call_of` makes a Failure of is not sent."""
        source = iter(requests)
        results: Results = queue.SimpleQueue()
        num_in_flight = 0
        submit = self._loop.call_soon_threadsafe
        self._is_asked = True
        try:
            while True:
                num_free = self._dispatcher.capacity - num_in_flight
                num_drawn = 0
                for request in itertools.islice(source, num_free):
                    num_drawn += 1
                    call = call_of(request)
                    if isinstance(call, Failure):
                        self._count(call)
                        yield request, call
                    else:
                        num_in_flight += 1
                        submit(self._dispatcher.add, Job(request, call, results))
                if num_drawn < num_free:
                    submit(self._dispatcher.drain, results)
                if not num_in_flight:
                    if num_drawn < num_free:
                        return
                    continue
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                job, outcome = result
                num_in_flight -= 1
                if not job.call.by_tokens and not isinstance(outcome, Failure):
                    outcome = replace(outcome, weight_version=self.weight_version)
                self._count(outcome)
                yield job.request, outcome
        finally:
            self._is_asked = False
            if not self._loop.is_closed():
                submit(self._dispatcher.abandon, results)

    def _count(self, outcome: Outcome) -> None:
        self._stats.count(outcome)
        is_silent = isinstance(outcome, Completion) and not (outcome.num_prompt_tokens and outcome.num_tokens)
        if is_silent and not self._warned_of_usage:
            self._warned_of_usage = True
            warnings.warn(
                "an endpoint does not report how many tokens it used, or not credibly; they are counted as 0",
                stacklevel=3,
            )

    def num_answers(self, url: str) -> int:
        """How many requests the server at `url` has answered."""
        return self._dispatcher.server(url).num_answers

    def num_in_flight(self, url: str) -> int:
        """How many requests the server at `url` has now."""
        return self._dispatcher.server(url).in_flight

    def was_open(self, url: str) -> bool:
        """Whether the server at `url` could ever be asked."""
        return self._dispatcher.server(url).was_open

    def fail(self, error: Exception) -> None:
        """End generation with `error`: whoever watches the servers calls this, from any thread."""
        self._loop.call_soon_threadsafe(self._dispatcher.fail, error)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return replace(self._stats)

    def close(self) -> None:
        """See `Engine.close`."""
        if self._loop.is_closed():
            return
        self._run(self._dispatcher.close())
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def _read_key(variable: str) -> str | None:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the key in the environment variable {variable} holds characters that no key has; correct it")
    return key or None
