"""A headless Chromium for tests, driven by its DevTools protocol: what a page shows, and a picture of it.

https://chromedevtools.github.io/devtools-protocol/
"""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_NAMES = ("chromium", "google-chrome", "chromium-headless-shell")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (set CHROMIUM to its program)")
PATIENCE_S = 240.0
# The text of a page with that of its shadow trees, which document.body.innerText does not have.
_SHOWN_TEXT = """(() => {
    const text = node => [...node.childNodes].map(child =>
        child.nodeType == 3 ? child.data
        : child.nodeType != 1 || ["SCRIPT", "STYLE"].includes(child.tagName) ? ""
        : (child.shadowRoot ? text(child.shadowRoot) : "") + text(child) + " ").join("");
    return text(document.body).replace(/\\s+/g, " ");
})()"""
_COUNT = """(selector => {
    const count = root => [...root.querySelectorAll("*")].reduce(
        (sum, one) => sum + one.matches(selector) + (one.shadowRoot ? count(one.shadowRoot) : 0), 0);
    return count(document);
})(%s)"""


class Page:
    """A page that a browser shows."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol; returns its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=PATIENCE_S)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    async def open(self, address: str, width: int, height: int) -> None:
        """Show an address in a window of this size; below 600 it is that of a phone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.command("Emulation.setDeviceMetricsOverride", **metrics)
        await self.command("Page.navigate", url=address)

    async def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return (await self.command("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def text(self) -> str:
        """All of its text."""
        return await self.value(_SHOWN_TEXT) or ""

    async def wait_for(self, *words: str) -> str:
        """Wait until these words are on the page; returns its text."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            text = await self.text()
            if all(word in text for word in words):
                return text
            assert time.monotonic() < deadline, f"waited in vain for {words} in:\n{text}"
            await asyncio.sleep(0.3)

    async def wait_for_elements(self, selector: str, number: int) -> None:
        """Wait until at least `number` elements of the page and its shadow trees match a CSS selector."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := await self.value(_COUNT % json.dumps(selector))) < number:
            assert time.monotonic() < deadline, f"{found} elements match {selector}"
            await asyncio.sleep(0.3)

    async def picture(self, path: Path, *, whole: bool = True) -> Path:
        """Write a PNG of the page, or of what the window shows of it."""
        answer = await self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path


def browse(folder: Path, visit: Callable[[Page], Awaitable[None]]) -> None:
    """Start a browser whose profile is in `folder`, let `visit` use a page of it, end it."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
    profile = folder / "profile"
    with (folder / "browser.txt").open("wb") as log:
        command = [CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        asyncio.run(_visit(_port(profile / "DevToolsActivePort", browser), visit))
    finally:
        os.killpg(browser.pid, signal.SIGKILL)  # Debian's program is a shell that waits for the browser
        browser.wait()


def _port(file: Path, browser: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not (file.exists() and file.read_text().strip()):
        assert browser.poll() is None and time.monotonic() < deadline, "the browser has not started"
        time.sleep(0.1)
    return int(file.read_text().split()[0])


async def _visit(port: int, visit: Callable[[Page], Awaitable[None]]) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [one for one in await answer.json() if one["type"] == "page"]
        async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            await visit(Page(socket))
