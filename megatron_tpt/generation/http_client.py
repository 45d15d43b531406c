"""HTTP with a key: what goes wrong on the way becomes UnusableAnswer."""

import asyncio
import urllib.request
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from megatron_tpt.errors import one_line
from megatron_tpt.generation.openai_api import UnusableAnswer, invalid_answer
from megatron_tpt.names import shown

MAX_ANSWER_BYTES = 16 << 20
"""The largest answer that is read, unpacked: a million tokens with their ids take about 12 MB."""
_CONNECT_TIMEOUT_S = 10.0
# Shorter than the time after which uvicorn closes an idle connection: else it may do so just as we send.
_KEEP_ALIVE_S = 4.0


class HttpAnswer(NamedTuple):
    """What came back, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    """When the status is not 200, without the key, should the server repeat it."""


class HttpClient:
    """Sends requests with the key, and turns what goes wrong on the way into UnusableAnswer.

    aiohttp and not httpx: with a thousand connections a request costs it 0.6 ms instead of 28 ms.
    """

    def __init__(self, timeout_s: float, key: str | None, *, use_proxies: bool) -> None:
        self._timeout_s = timeout_s
        self.key = key
        self._use_proxies = use_proxies
        self._session: Any = None

    async def get(self, url: str, *, timeout_s: float) -> HttpAnswer:
        """GET `url`."""
        return await self._ask("GET", url, None, min(timeout_s, self._timeout_s))

    async def post(self, url: str, body: bytes) -> HttpAnswer:
        """POST a JSON `body` to `url`."""
        return await self._ask("POST", url, body, self._timeout_s)

    async def _ask(self, method: str, url: str, body: bytes | None, timeout_s: float) -> HttpAnswer:
        import aiohttp

        session = self._session = self._session or self._open()
        try:
            async with (
                asyncio.timeout(timeout_s),
                session.request(method, url, data=body, allow_redirects=False, proxy=self._proxy(url)) as response,
            ):
                content = await _content(url, response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UnusableAnswer("connection", f"{url} cannot be reached ({error})", counts=False) from error
        except TimeoutError as error:
            raise UnusableAnswer("timeout", f"{url} gave no answer for {timeout_s:g} s", counts=True) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: malformed headers
            cause = shown(one_line(error))
            raise UnusableAnswer("connection", f"{url} cut the connection ({cause})", counts=True) from error
        if self.key and (response.status != 200 or b'"error"' in content):
            content = content.replace(self.key.encode(), b"***")
        return HttpAnswer(response.status, response.headers, content)

    def _open(self) -> Any:
        import aiohttp

        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return aiohttp.ClientSession(
            # How many connections there may be is the dispatcher's business.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers=headers,
            auto_decompress=False,  # it knows no limit
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def _proxy(self, url: str) -> str | None:
        """The proxy that the environment (HTTPS_PROXY, NO_PROXY ...) names for `url`.

        aiohttp's own way would also send passwords from ~/.netrc.
        """
        parts = urlsplit(url)
        if not self._use_proxies or urllib.request.proxy_bypass(parts.hostname or ""):
            return None
        return urllib.request.getproxies().get(parts.scheme)

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


async def _content(url: str, response: Any) -> bytes:
    """The body, unpacked. Raises UnusableAnswer when it is too large, before it is in memory."""
    packing = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip"):
        raise invalid_answer(url, f"the answer is packed as {packing[:20]!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=31) if "gzip" in packing else None
    content = bytearray()
    try:
        async for chunk in response.content.iter_any():
            content += unpacker.decompress(chunk, MAX_ANSWER_BYTES - len(content) + 1) if unpacker else chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise invalid_answer(url, f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
    except zlib.error as error:
        raise invalid_answer(url, f"the answer cannot be unpacked ({error})") from error
    if unpacker and content and not unpacker.eof:
        raise invalid_answer(url, "the answer cannot be unpacked (it is truncated)")
    return bytes(content)
