"""A real HTTP server that speaks OpenAI's protocol, and misbehaves as the prompts say.

The prompt "hang 2 a" hangs the first two times it is asked and is answered from then on; "400 9 b" is refused nine
times. What follows the number only distinguishes prompts.
"""

import asyncio
import contextlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

from aiohttp import web
from ports import free_port

MODEL = "unruly"
KEY = "sk-secret-0123456789"


class UnrulyServer:
    """Serves `MODEL` at `url` from a thread of its own, until `stop`; `start` opens the same port again."""

    def __init__(
        self,
        *,
        owner: str = "somebody",
        models: tuple[str, ...] = (MODEL,),
        key: str | None = None,
        context: int | None = None,
    ) -> None:
        self.owner, self.models, self.key, self.context = owner, models, key, context
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.status: int | None = None
        """When set, the answer to everything."""
        self.usage = True
        self.thinks: Literal["", "aloud", "apart"] = ""
        """Whether its model thinks before it answers a chat; "apart": reported by a server that takes the tags out."""
        self.takes_stop = True
        self.reasoning: str | None = "hm"
        """What chats hand out apart from the text."""
        self.answers: dict[str, str | dict[str, Any]] = {}
        """What it answers to some prompts: a text, or the whole body."""
        self.refuses: Callable[[dict[str, Any]], str | tuple[int, str] | None] = lambda body: None
        """With which sentence (and status, 400 if not given) it refuses a request; None serves it."""
        self.message: dict[str, Any] = {}
        """What chats hand out in place of the text and the reasoning."""
        self.delay_s = 0.0
        self.in_flight = self.max_in_flight = 0
        self._asked: Counter[str] = Counter()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=[started], daemon=True)
        self._thread.start()
        assert started.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start())
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._die(runner))
        self._loop.close()

    async def _die(self, runner: web.AppRunner) -> None:
        """Close the port and cut all connections, as a process that is killed."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        for site in list(runner.sites):
            await site.stop()
        assert runner.server is not None
        for connection in runner.server.connections:
            connection.force_close()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _refusal(self, request: web.Request) -> web.Response | None:
        sent = request.headers.get("Authorization", "")
        self.headers.append(dict(request.headers))
        if self.key is not None and sent != f"Bearer {self.key}":
            return web.json_response({"error": {"message": f"bad key: {sent}"}}, status=401)
        if self.status is not None:
            return web.json_response({"error": {"message": f"no luck with {sent}"}}, status=self.status)
        return None

    async def _models(self, request: web.Request) -> web.Response:
        listed = [{"id": name, "owned_by": self.owner, "max_model_len": self.context} for name in self.models]
        return self._refusal(request) or web.json_response({"data": listed})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            return self._refusal(request) or await self._answer(request)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        if (refusal := self.refuses(body)) is not None:
            status, sentence = refusal if isinstance(refusal, tuple) else (400, refusal)
            return web.json_response({"error": {"message": sentence}}, status=status)
        if isinstance(prompt, str) and (order := re.match(r"(\S+) (\d+)", prompt)):
            fault, times = order.groups()
            if fault == "slow":
                await asyncio.sleep(0.5)
            self._asked[prompt] += 1
            if self._asked[prompt] <= int(times):
                return await self._misbehave(fault, request)
        if "stop" in body and not self.takes_stop:
            return web.json_response({"error": "Argument not supported on this model: stop"}, status=400)
        if isinstance(whole := self.answers.get(str(prompt)), dict):
            return web.json_response(whole)
        if self.thinks:
            return web.json_response(self._thoughtful(body.get("stop", [])))
        content: dict[str, Any] = {"choices": [self._choice(self._text(prompt), is_chat)]}
        if self.usage:
            content["usage"] = {"prompt_tokens": 3, "completion_tokens": 5}
        return web.json_response(content)

    def _text(self, prompt: Any) -> str:
        return str(self.answers.get(str(prompt), f"answer to {prompt}"))

    def _thoughtful(self, stop: list[str]) -> dict[str, Any]:
        """A chat's answer by a model whose prompt ends in "<think>"; every word is a token."""
        raw = "why heat flows </think> it just does"
        for text in stop:
            raw = raw.partition(text)[0]
        message: dict[str, Any] = {"role": "assistant", "content": raw}
        if self.thinks == "apart":
            thinking, closed, answer = raw.partition("</think>")
            message |= {"content": answer if closed else None, "reasoning_content": thinking}
        usage = {"prompt_tokens": 3, "completion_tokens": len(raw.split())}
        return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

    def _choice(self, text: str, is_chat: bool) -> dict[str, Any]:
        if is_chat:
            message = {"role": "assistant", "content": text, "reasoning_content": self.reasoning} | self.message
            return {"message": message, "finish_reason": "stop"}
        return {"text": text, "finish_reason": "length"}

    async def _misbehave(self, fault: str, request: web.Request) -> web.StreamResponse:
        match fault:
            case "hang":
                await asyncio.sleep(3600)
            case "cut":
                response = web.StreamResponse(headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b'{"choices": [')
                assert request.transport is not None
                request.transport.close()
                return response
            case "garbage":
                return web.Response(text="<html>a proxy's page</html>")
            case "nochoices":
                return web.json_response({"choices": [], "usage": {}})
            case "notext":
                return web.json_response({"choices": [{"finish_reason": "stop"}]})
            case "unfinished":
                return web.json_response({"choices": [{"text": "a", "finish_reason": None}]})
            case "filtered":
                return web.json_response({"choices": [{"text": "", "finish_reason": "content_filter"}]})
            case "429":
                return web.json_response({"error": "slow down"}, status=429, headers={"Retry-After": "0.2"})
            case "big":
                message = "Request too large for unruly on tokens per min (TPM): Limit 8, Requested 9."
                return web.json_response({"error": {"message": message}}, status=429)
            case "long":
                error = {"message": "This model's maximum context length is 8 tokens", "code": 400}
                return web.json_response({"error": error}, status=400)
        sent = request.headers.get("Authorization", "")
        return web.json_response(json.loads(json.dumps({"error": {"message": f"{sent} no"}})), status=int(fault))


@contextlib.contextmanager
def unruly_server(**options: Any) -> Iterator[UnrulyServer]:
    """A server that runs for the length of the block."""
    server = UnrulyServer(**options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
