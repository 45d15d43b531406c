"""One server of the endpoint engine: what is known of it, and how it is asked."""

import asyncio
import logging
import math
import queue
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import EngineOptions, Failure
from megatron_tpt.generation.http_client import HttpAnswer, HttpClient
from megatron_tpt.generation.openai_api import (
    PATHS,
    ListedModel,
    Outcome,
    check_status,
    parse_answer,
    parse_models,
    refuses_stop,
)
from megatron_tpt.generation.openai_requests import Call, request_body, without_stop
from megatron_tpt.generation.request_fields import advice_on_refusal

logger = logging.getLogger(__name__)

_MODELS_TIMEOUT_S = 30.0

Results = queue.SimpleQueue["tuple[Job, Outcome] | Exception"]


@dataclass(eq=False)
class Job:
    """A request in flight, and where its outcome goes."""

    request: Any
    """What the caller gave, and gets back with the outcome."""
    call: Call
    results: Results
    num_failures: int = 0
    """Those that may be the request's own fault."""
    num_isolated_failures: int = 0
    """Those of them between which and the last one others were completed: the servers do their work."""
    last_failure_s: float = float("-inf")
    last_server: "Server | None" = None
    """The one that failed last."""
    task: "asyncio.Task[None] | None" = None
    is_held: bool = False
    """Refused by a server that may refuse all others too."""


class Refusal(NamedTuple):
    """A request that a server refused."""

    job: Job
    failure: Failure
    sent_s: float


@dataclass(eq=False)
class Server:
    """One endpoint. Times are those of time.monotonic()."""

    url: str
    options: EngineOptions
    client: HttpClient
    max_in_flight: int
    limit: int
    """How many requests it gets at once now: halved when it says that it is overloaded, and grown again."""
    in_flight: int = 0
    is_open: bool = False
    """It has listed our model since it was last out of reach."""
    listed: ListedModel = field(default_factory=ListedModel)
    rests_until_s: float = 0.0
    last_rest_s: float = float("-inf")
    num_failures: int = 0
    """In a row; those of requests sent before its last rest count as one."""
    failing_since_s: float | None = None
    takes_stop: bool = True
    """Whether it takes texts that end a completion; some refuse them for models that think."""
    was_open: bool = False
    num_answers: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    """Those of requests that are held."""
    is_probed: bool = False

    def is_free(self, now_s: float) -> bool:
        return self.is_open and self.in_flight < self.limit and now_s >= self.rests_until_s

    def succeeded(self) -> None:
        self.num_answers += 1
        self.num_failures = 0
        self.failing_since_s = None
        self.limit = min(self.limit + 1, self.max_in_flight)

    def failed(self, now_s: float) -> None:
        self.num_failures += 1
        if self.failing_since_s is None:
            self.failing_since_s = now_s

    async def ask(self, call: Call) -> Outcome:
        """What the server makes of `call`. Raises what `parse_answer` raises, and UserError for a call that this
        server cannot be trusted with."""
        request, url = call.request, self._address(call)
        if call.needs_vllm and not self.listed.is_vllm:
            raise UserError(
                f"{self.url}: vLLM does not serve this model, so its log-probabilities are not relied on; name servers "
                'of vLLM, or choose the engine "vllm", "vllm-server" or "transformers"'
            )
        if self.options.max_model_len is None and request.sampling.max_new_tokens >= (self.listed.context or math.inf):
            raise UserError(
                f"{self.url}: its context is {self.listed.context} tokens, which leaves no room for a prompt and "
                f"{request.sampling.max_new_tokens} new tokens; lower --max-new-tokens, or use a server with more"
            )
        if not self.takes_stop:
            return parse_answer(url, *await self._post(without_stop(call)), call.read)
        answer = await self._post(call)
        if request.sampling.stop and refuses_stop(answer.status, answer.body):
            unstopped = await self._post(without_stop(call))
            if unstopped.status == 200:
                self.takes_stop, answer = False, unstopped
                logger.warning(f"{url} takes no stop texts: what comes after {request.sampling.stop} is paid for")
        return parse_answer(url, *answer, call.read)

    async def _post(self, call: Call) -> HttpAnswer:
        body = request_body(call, self.options, is_vllm=self.listed.is_vllm)
        return await self.client.post(self._address(call), body)

    def _address(self, call: Call) -> str:
        return self.url.removesuffix("/v1") + call.path if call.path else self.url + PATHS[self.options.api]

    def refuses_all(self, call: Call, sentence: str) -> str:
        """The message for a server that refuses a short test too, in its own `sentence`."""
        what = f"has completed {self.num_answers:,} requests and now refuses" if self.num_answers else "refuses"
        return f"{self._address(call)} {what} every request, a short test included: {sentence}" + advice_on_refusal(
            sentence, self.options.length_field
        )

    async def check_model(self) -> None:
        """Read what the server lists about our model. Raises UserError when it has only another one."""
        url = self.url + "/models"
        answer = await self.client.get(url, timeout_s=_MODELS_TIMEOUT_S)
        check_status(url, *answer)
        if answer.status != 200:
            raise UserError(f"{url} answered {answer.status}; check the URL")
        models = parse_models(url, answer.body)
        name = self.options.model
        if name not in models and len(models) == 1:
            raise UserError(f"{url} lists one model, {next(iter(models))!r}, and not {name!r}; ask for that one")
        self.listed = models.get(name, ListedModel())
