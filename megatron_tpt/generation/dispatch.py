"""Which server gets which request, and when again: the part of the endpoint engine that runs in its event loop.

A request without a usable answer is retried, elsewhere if possible, after a random wait that doubles. Faults of the
server and of the request are distinguished:

- A server that cannot be reached, or cuts a connection, is closed until it lists its models again; one that is
  overloaded (429, 503) rests for as long as it asks, and gets fewer requests at once; one that keeps failing rests for
  a while.
- A request fails after `max_retries` failures that may be its own fault, if others were completed between them.
  So one bad request cannot hold up the run, and neither an outage nor a quota that is used up, however long it lasts,
  can turn a data set into failures.
- A request that a server refuses (400 and the like) is held until the same server has completed one that was sent
  later: then it is the request's own fault, and a Failure. Where none is completed, the server is asked something
  short and harmless; if it refuses that too, it refuses every request (a field that the model does not take, a model
  that is gone), and generation ends with the server's own sentence.
"""

import asyncio
import functools
import logging
import math
import random
import time
from collections import deque
from collections.abc import Coroutine
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import EngineError, EngineOptions, EngineStats, Failure
from megatron_tpt.generation.http_client import HttpClient
from megatron_tpt.generation.openai_api import Outcome, Refused, UnusableAnswer
from megatron_tpt.generation.openai_requests import probe
from megatron_tpt.generation.server import Job, Refusal, Results, Server

logger = logging.getLogger(__name__)

DEFAULT_MAX_IN_FLIGHT = 64
_FIRST_WAIT_S = 0.5
_MAX_WAIT_S = 30.0
_MAX_LOCAL_WAIT_S = 1.0
_FAILURES_UNTIL_REST = 3
_REFUSALS_UNTIL_PROBE = 8


class Dispatcher:
    """Shares jobs among servers. All but `capacity`, `server` and `open_servers` is for the event loop's thread."""

    def __init__(self, options: EngineOptions, client: HttpClient, stats: EngineStats, *, is_local: bool) -> None:
        max_in_flight = options.max_num_seqs or DEFAULT_MAX_IN_FLIGHT
        urls = dict.fromkeys(url.rstrip("/") for url in options.endpoints)
        self._servers = [Server(url, options, client, max_in_flight, max_in_flight) for url in urls]
        self.capacity = max_in_flight * len(self._servers)
        """How many jobs there may be at once."""
        self._options = options
        self._stats = stats
        self._patience_s = float("inf") if is_local else options.endpoint_patience_s
        self._max_wait_s = _MAX_LOCAL_WAIT_S if is_local else _MAX_WAIT_S
        self._waiting: deque[Job] = deque()
        self._jobs: dict[Job, None] = {}
        self._draining: set[int] = set()
        self._last_success_s = float("-inf")
        self._error: Exception | None = None
        self._opened = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to ask the servers for their models."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.fail(context.get("exception") or RuntimeError(str(context))))
        for server in self._servers:
            self._spawn(self._reopen(server))

    async def wait_until_open(self) -> None:
        """Wait until one server is open. Raises UserError for servers that want another key or model."""
        await self._opened.wait()
        if self._error is not None:
            raise self._error

    @property
    def open_servers(self) -> list[Server]:
        """Those that could ever be asked."""
        return [server for server in self._servers if server.was_open]

    def server(self, url: str) -> Server:
        """The server at `url`. Its counts can be read from any thread."""
        return next(server for server in self._servers if server.url == url)

    def add(self, job: Job) -> None:
        """Take on `job`; its end will be put into its queue."""
        if self._error is not None:
            job.results.put(self._error)
            return
        self._jobs[job] = None
        self._waiting.append(job)
        self._dispatch()

    def drain(self, results: Results) -> None:
        """Note that no more jobs will come for `results`."""
        self._draining.add(id(results))

    def abandon(self, results: Results) -> None:
        """Drop what is in flight for `results`."""
        self._draining.discard(id(results))
        for job in [job for job in self._jobs if job.results is results]:
            self._drop(job)
        self._waiting = deque(job for job in self._waiting if job in self._jobs)
        for server in self._servers:
            server.refusals = [refusal for refusal in server.refusals if refusal.job in self._jobs]

    def fail(self, error: BaseException) -> None:
        """End everything with `error`."""
        self._error = self._error or (error if isinstance(error, Exception) else RuntimeError(repr(error)))
        self._opened.set()
        for results in {id(job.results): job.results for job in self._jobs}.values():
            results.put(self._error)
        for job in list(self._jobs):
            self._drop(job)
        self._waiting.clear()

    def require_hope(self) -> None:
        """Raise the error that has ended everything, if there is one. From any thread."""
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Stop all that is in flight."""
        self._jobs.clear()
        self._waiting.clear()
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _drop(self, job: Job) -> None:
        del self._jobs[job]
        if job.task is not None:
            job.task.cancel()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.fail(error)

    def _dispatch(self) -> None:
        """Send what waits to servers that are free."""
        now_s = time.monotonic()
        while self._waiting:
            free = [server for server in self._servers if server.is_free(now_s)]
            if not free:
                return
            job = self._waiting.popleft()
            server = min(free, key=lambda server: (server is job.last_server, server.in_flight / server.max_in_flight))
            server.in_flight += 1
            self._stats.num_sent += 1
            job.task = self._spawn(self._attempt(job, server))
            job.task.add_done_callback(functools.partial(self._release, server))

    def _release(self, server: Server, _: asyncio.Task[None]) -> None:
        server.in_flight -= 1
        self._dispatch()

    async def _attempt(self, job: Job, server: Server) -> None:
        sent_s = time.monotonic()
        try:
            outcome = await server.ask(job.call)
        except Refused as refused:
            if job in self._jobs:
                job.is_held = True
                server.refusals.append(Refusal(job, refused.failure, sent_s))
        except UnusableAnswer as answer:
            self._learn_of_failure(server, answer, sent_s)
            self._try_again(job, server, answer)
        else:
            self._last_success_s = time.monotonic()
            server.succeeded()
            self._finish(job, outcome)
            self._end_refused(server, sent_s)
        self._probe_where_needed()

    def _end_refused(self, server: Server, before_s: float) -> None:
        """Fail what `server` refused before it was sent something that it then completed."""
        earlier = [refusal for refusal in server.refusals if refusal.sent_s <= before_s]
        server.refusals = [refusal for refusal in server.refusals if refusal.sent_s > before_s]
        for refusal in earlier:
            self._finish(refusal.job, refusal.failure)

    def _probe_where_needed(self) -> None:
        """Ask servers that have refused many requests, or all that are left, whether they serve any."""
        for server in self._servers:
            if not server.refusals or server.is_probed:
                continue
            if len(server.refusals) >= _REFUSALS_UNTIL_PROBE or all(
                job.is_held or job.num_failures for job in self._jobs
            ):
                server.is_probed = True
                self._spawn(self._probe(server))

    async def _probe(self, server: Server) -> None:
        """Ask `server` something short. Raises UserError when it refuses that too."""
        sent_s = time.monotonic()
        try:
            if not server.refusals:  # it has completed another request since this task was made
                return
            call = probe(server.refusals[-1].job.call)
            await server.ask(call)
        except Refused as refused:
            raise UserError(server.refuses_all(call, refused.failure.message)) from refused
        except UnusableAnswer as answer:
            # Nothing is learned about the refused ones: they are retried, elsewhere if possible.
            self._learn_of_failure(server, answer, sent_s)
            held, server.refusals = server.refusals, []
            for job in [refusal.job for refusal in held if refusal.job in self._jobs]:
                job.is_held, job.last_server = False, server
                self._stats.num_retried += 1
                asyncio.get_running_loop().call_later(self._wait_s(server.num_failures, answer), self._requeue, job)
        else:
            server.succeeded()
            self._end_refused(server, sent_s)
        finally:
            server.is_probed = False
        self._probe_where_needed()

    def _finish(self, job: Job, outcome: Outcome) -> None:
        if job in self._jobs:
            del self._jobs[job]
            job.results.put((job, outcome))

    def _learn_of_failure(self, server: Server, answer: UnusableAnswer, sent_s: float) -> None:
        now_s = time.monotonic()
        if sent_s < server.last_rest_s:
            return  # what was in flight when the server failed fails with it: no new information
        server.failed(now_s)
        if server.num_failures == _FAILURES_UNTIL_REST:
            self._tell(answer)
        if answer.reason == "connection":
            if server.is_open:
                server.is_open = False
                server.last_rest_s = now_s
                self._spawn(self._reopen(server, answer))
        elif not answer.counts or server.num_failures >= _FAILURES_UNTIL_REST:
            if answer.reason == "rate_limit":
                server.limit = max(1, server.in_flight // 2)
            num_failures = server.num_failures - (_FAILURES_UNTIL_REST if answer.counts else 0)
            rest_s = self._wait_s(num_failures, answer)
            server.last_rest_s = now_s
            server.rests_until_s = now_s + rest_s
            asyncio.get_running_loop().call_later(rest_s, self._dispatch)
        self._check_patience(str(answer))

    def _tell(self, answer: UnusableAnswer) -> None:
        """Say once that a server is in trouble: what follows may be minutes of waiting for it."""
        if not math.isinf(self._patience_s):
            logger.warning(f"{answer}; retrying for up to {self._patience_s:g} s")

    def _try_again(self, job: Job, server: Server, answer: UnusableAnswer) -> None:
        """Fail `job`, or put it back into the queue: before those that were not sent yet, if they wait for it."""
        if job not in self._jobs:
            return
        job.last_server = server
        if answer.counts:
            job.num_failures += 1
            job.num_isolated_failures += self._last_success_s > job.last_failure_s
            job.last_failure_s = time.monotonic()
            if self._is_hopeless(job):
                self._finish(job, Failure(answer.reason, str(answer)))
                return
        self._stats.num_retried += 1
        if answer.counts:
            asyncio.get_running_loop().call_later(self._wait_s(job.num_failures, answer), self._requeue, job)
        else:
            self._waiting.append(job)  # at the end: should it always be refused, the others still get their turn
            self._dispatch()

    def _requeue(self, job: Job) -> None:
        if job in self._jobs:
            self._waiting.appendleft(job)
            self._dispatch()

    def _is_hopeless(self, job: Job) -> bool:
        max_failures = self._options.max_retries
        if job.num_isolated_failures > max_failures:
            return True
        # At the end there may be no others that could show that the servers do their work.
        only_such_left = id(job.results) in self._draining and all(
            other.num_failures > max_failures for other in self._jobs if not other.is_held
        )
        return only_such_left and self._last_success_s > float("-inf")

    def _check_patience(self, last_error: str) -> None:
        since = [server.failing_since_s for server in self._servers if server.num_failures >= _FAILURES_UNTIL_REST]
        if len(since) == len(self._servers):
            failing_s = time.monotonic() - max(start for start in since if start is not None)
            if failing_s > self._patience_s:
                raise EngineError(f"no endpoint has answered for {failing_s:.0f} s; the last error: {last_error}")

    def _wait_s(self, num_failures: int, answer: UnusableAnswer) -> float:
        """What the server asked for; else a random time ("full jitter") whose limit doubles with every failure.

        Randomness keeps requests that failed together from retrying together.
        """
        if answer.retry_after_s is not None:
            return min(answer.retry_after_s, self._patience_s) + random.uniform(0, _FIRST_WAIT_S)
        return random.uniform(0, min(self._max_wait_s, _FIRST_WAIT_S * 2 ** min(num_failures, 16)))

    async def _reopen(self, server: Server, answer: UnusableAnswer | None = None) -> None:
        """Ask for the models of `server` until it lists them; after `answer`, not at once."""
        while not server.is_open:
            if answer is not None:
                await asyncio.sleep(self._wait_s(server.num_failures, answer))
            try:
                await server.check_model()
                server.is_open = server.was_open = True
            except UnusableAnswer as error:
                answer = error
                server.failed(time.monotonic())
                if server.num_failures == 1:
                    self._tell(error)
                self._check_patience(str(error))
        self._opened.set()
        self._dispatch()
