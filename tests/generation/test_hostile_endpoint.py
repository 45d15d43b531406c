"""Endpoints that attack: whatever they send, memory and time stay bounded, and no other error comes of it."""

import asyncio
import contextlib
import functools
import gzip
import json
import resource
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies
from ports import free_port

from megatron_tpt.errors import UserError
from megatron_tpt.generation import Completion, EngineError, EngineOptions, Failure, Request, Sampling, open_engine
from megatron_tpt.generation.http_client import MAX_ANSWER_BYTES, HttpAnswer, HttpClient
from megatron_tpt.generation.openai_api import UnusableAnswer, parse_answer, parse_models, retry_after_s

KEY = "sk-secret-0123456789"
CHOICE = {"message": {"content": "t"}, "finish_reason": "stop"}
GOOD = json.dumps({"choices": [CHOICE], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}).encode()
MODELS = b'{"data": [{"id": "m"}]}'

Behaviour = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class RawServer:
    """Answers every request with what `behave` writes; `heads` are the requests' heads."""

    def __init__(self, behave: Behaviour) -> None:
        self.heads: list[bytes] = []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._behave = behave

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                sizes = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length:" in line]
                await reader.readexactly(int(sizes[0]) if sizes else 0)
                await self._behave(head, writer)
                await writer.drain()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["RawServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        try:
            yield self
        finally:
            server.close()


@contextlib.contextmanager
def in_thread(behave: Behaviour) -> Iterator[RawServer]:
    server, loop = RawServer(behave), asyncio.new_event_loop()
    context = server.running()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(30)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def head(more: str = "", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{more}\r\n".encode()


def whole(body: bytes, more: str = "", status: str = "200 OK") -> bytes:
    return head(f"{more}Content-Length: {len(body)}\r\n", status) + body


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@functools.cache
def packed_zeros() -> bytes:
    """Unpacks to 256 MiB."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()


async def bomb(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(whole(packed_zeros(), "Content-Encoding: gzip\r\n"))


async def blanks(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(head(f"Content-Length: {8 << 30}\r\n"))
    for _ in range(8192):
        writer.write(b" " * (1 << 20))
        await writer.drain()


async def endless_events(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(head("Transfer-Encoding: chunked\r\n"))
    while True:
        writer.write(chunked(b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'))
        await writer.drain()
        await asyncio.sleep(0.01)


async def drip(_: bytes, writer: asyncio.StreamWriter) -> None:
    for byte in whole(GOOD):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.3)


async def endless_headers(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-A: b\r\n" * 1000)
        await writer.drain()


def says(content: bytes) -> Behaviour:
    async def behave(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        writer.close()

    return behave


def post(behave: Behaviour, timeout_s: float = 60.0) -> HttpAnswer:
    async def ask() -> HttpAnswer:
        async with RawServer(behave).running() as server:
            client = HttpClient(timeout_s, KEY, use_proxies=False)
            try:
                return await client.post(server.url, b"{}")
            finally:
                await client.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("behave", [bomb, blanks])
def test_an_answer_is_not_read_beyond_its_limit(behave: Behaviour) -> None:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnusableAnswer, match="larger than 16 MiB") as caught:
        post(behave)
    assert caught.value.reason == "invalid_response" and caught.value.counts
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 10 * MAX_ANSWER_BYTES >> 10


@pytest.mark.parametrize(
    "content",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 200_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 99999 X\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1e999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\x00\x1b[31m: \xff\r\n\r\n",
        head("Transfer-Encoding: chunked\r\n") + b"zz\r\nabc\r\n",
        head("Transfer-Encoding: chunked\r\n") + b"fffffffffffffffffffff\r\n",
        head("Content-Length: 100\r\n") + b"{}",
        whole(GOOD, "Content-Encoding: gzip\r\n"),
        whole(gzip.compress(GOOD)[:-9], "Content-Encoding: gzip\r\n"),
        whole(GOOD, "Content-Encoding: br\r\n"),
        b"",
    ],
)
def test_what_is_no_http_or_not_whole_is_an_unusable_answer_on_one_line(content: bytes) -> None:
    with pytest.raises(UnusableAnswer) as caught:
        post(says(content))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_endless_headers_are_not_read_to_the_end() -> None:
    with pytest.raises(UnusableAnswer):
        post(endless_headers)


@pytest.mark.parametrize("behave", [drip, endless_events])
def test_a_slow_or_endless_answer_is_abandoned_after_the_time_of_a_request(behave: Behaviour) -> None:
    with pytest.raises(UnusableAnswer, match=r"no answer for 1 s"):
        post(behave, timeout_s=1.0)


def test_a_packed_answer_is_read() -> None:
    answer = post(says(whole(gzip.compress(GOOD), "Content-Encoding: gzip\r\n")))
    assert parse_answer("u", *answer) == Completion("t", (), "stop", 3, 5)


@pytest.mark.parametrize("behave", [drip, endless_events, bomb])
def test_an_endpoint_that_never_answers_ends_the_run_when_patience_ends(behave: Behaviour) -> None:
    async def lists_and_fails(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/models" in request.partition(b"\r\n")[0]:
            writer.write(whole(MODELS))
        else:
            await behave(request, writer)

    with in_thread(lists_and_fails) as server:
        options = EngineOptions(
            "m", kind="endpoint", endpoints=(server.url,), request_timeout_s=0.5, endpoint_patience_s=2.0
        )
        with open_engine(options) as engine, pytest.raises(EngineError, match="no endpoint has answered for"):
            list(engine.generate([Request("hello", Sampling(max_new_tokens=7))]))


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_no_redirect_is_followed_so_that_the_key_goes_nowhere_else(
    status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with in_thread(says(whole(MODELS))) as other:
        location = f"Location: {other.url}/models\r\n"
        with in_thread(says(whole(b"", location, status))) as server:
            options = EngineOptions("m", kind="endpoint", endpoints=(server.url,), endpoint_patience_s=30.0)
            with pytest.raises(UserError, match="sends elsewhere"), open_engine(options):
                pass
        assert KEY.encode() in server.heads[0]
        assert other.heads == []


@pytest.mark.parametrize(
    "changes",
    [
        {"usage": [1]},
        {"choices": [CHOICE | {"finish_reason": ["stop"]}]},
        {"choices": [CHOICE | {"finish_reason": {}}]},
        {"choices": [CHOICE | {"token_ids": [1.5]}]},
        {"choices": [CHOICE | {"token_ids": [-1]}]},
        {"choices": [CHOICE | {"message": {"content": [[[1]]]}}]},
    ],
)
def test_reasons_and_token_ids_that_cannot_be_are_unusable(changes: dict[str, Any]) -> None:
    with pytest.raises(UnusableAnswer):
        parse_answer("u", 200, {}, json.dumps(json.loads(GOOD) | changes).encode())


@pytest.mark.parametrize("number", [1e308, -5, 2**40, True, "7", [7], {}, 0.5, None])
def test_numbers_of_tokens_that_cannot_be_are_not_counted(number: Any) -> None:
    usage = {"prompt_tokens": number, "completion_tokens": number}
    answer = parse_answer("u", 200, {}, json.dumps(json.loads(GOOD) | {"usage": usage}).encode())
    assert answer == Completion("t", (), "stop", 0, 0)
    listed = parse_models("u", json.dumps({"data": [{"id": "m", "max_model_len": number}]}).encode())
    assert listed["m"].context is None


def test_parts_nested_without_end_are_unusable() -> None:
    nested = b'{"choices": [{"message": {"content": ' + b"[" * 1000 + b"]" * 1000 + b'}, "finish_reason": "stop"}]}'
    with pytest.raises(UnusableAnswer):
        parse_answer("u", 200, {}, nested)


@pytest.mark.parametrize("body", [b'{"error": {"code": "' + b"4" * 5000 + b'"}}', b'{"a":' * 900 + b"1" + b"}" * 900])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_odd_errors_are_unusable(status: int, body: bytes) -> None:
    with pytest.raises(UnusableAnswer):
        parse_answer("u", status, {}, body)


@pytest.mark.parametrize("entry", [{"id": None}, {"id": ["m"]}, {}, "m"])
def test_a_list_of_models_without_names_is_unusable(entry: Any) -> None:
    with pytest.raises(UnusableAnswer):
        parse_models("u", json.dumps({"data": [entry]}).encode())


def test_what_an_endpoint_says_cannot_steer_the_terminal() -> None:
    body = json.dumps({"error": {"message": "a\x1b]0;title\x07 \u202egnp.exe\r\nerror: forged \x9b31m"}}).encode()
    with pytest.raises(UnusableAnswer) as caught:
        parse_answer("u", 500, {}, body)
    assert str(caught.value) == r"u answered 500 (a\x1b]0;title\x07 \u202egnp.exe error: forged \x9b31m)"


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from(
                [
                    "choices",
                    "message",
                    "content",
                    "usage",
                    "error",
                    "code",
                    "finish_reason",
                    "text",
                    "data",
                    "id",
                    "type",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
ANSWERS = strategies.builds(
    lambda changes, choice: {"choices": [CHOICE | choice]} | changes,
    strategies.dictionaries(strategies.sampled_from(["choices", "usage", "error"]), JSON, max_size=2),
    strategies.dictionaries(
        strategies.sampled_from(["message", "finish_reason", "token_ids", "text"]), JSON, max_size=2
    ),
)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(
    JSON | ANSWERS, strategies.sampled_from([200, 200, 200, 204, 400, 404, 418, 429, 500]), strategies.text(max_size=30)
)
def test_any_answer_is_a_completion_or_a_failure_or_unusable(answer: Any, status: int, header: str) -> None:
    body = json.dumps(answer).encode()
    with contextlib.suppress(UnusableAnswer, UserError):
        outcome = parse_answer("u", status, {"Retry-After": header}, body)
        assert isinstance(outcome, Completion | Failure)
        if isinstance(outcome, Completion):
            assert isinstance(outcome.text, str) and outcome.num_tokens >= 0 and outcome.num_prompt_tokens >= 0
    with contextlib.suppress(UnusableAnswer):
        assert all(isinstance(name, str) for name in parse_models("u", body))
    assert (retry_after_s({"Retry-After": header}) or 0.0) >= 0.0
