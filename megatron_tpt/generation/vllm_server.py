"""vLLM servers on this machine, started, watched and ended here: one for every group of GPUs, or on the CPU.

    LOG_DIR/server-0.log   what server 0 says
    LOG_DIR/server-1.log   ...

A server that dies is restarted, and its requests are sent elsewhere meanwhile; one that hangs is ended, and then
restarted too. Every server runs under a keeper (`keeper.py`), so that none outlives this process.
"""

import http.client
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tpt.generation.api import (
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
from megatron_tpt.generation.cpu import dtype_name, note_choice, stored_dtype
from megatron_tpt.generation.endpoint import EndpointEngine
from megatron_tpt.generation.models import check_model
from megatron_tpt.generation.vllm_command import device_groups, server_command, threads_of_server
from megatron_tpt.generation.vllm_engine import CPU_MAX_NUM_SEQS, max_model_len

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_MAX_DEATHS_IN_A_ROW = 3
_LOOKS_PER_HANG = 20
_METRICS_TIMEOUT_S = 5.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_GPU_MAX_NUM_SEQS = 512


@dataclass(eq=False)
class _Server:
    """One vLLM server and what is needed to start it again."""

    number: int
    url: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    keeper: subprocess.Popen[bytes] | None = None
    num_deaths: int = 0
    """In a row, without a completion between them."""
    num_answers: int = 0
    """As of its last death."""
    num_tokens: float | None = None
    """Those that it had processed at the last check."""
    next_look_s: float = 0.0
    last_progress_s: float = 0.0
    """When it had last processed some, or had no requests (time.monotonic())."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.keeper = subprocess.Popen(
                [sys.executable, "-m", "megatron_tpt.generation.keeper", str(os.getpid()), *self.command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: we end the servers in order
            )


class VLLMServerEngine:
    """`options.num_engines` vLLM servers behind an EndpointEngine. Raises EngineError when one dies at its start."""

    def __init__(self, options: EngineOptions) -> None:
        check_model(options.model)
        self.abilities = possible_abilities(options)
        self.weight_version = 0
        key = secrets.token_urlsafe(32)  # the servers listen to this machine, where others may be logged in
        self.max_model_len = max_model_len(options)
        log_dir = options.log_dir or Path(tempfile.mkdtemp(prefix="vllm-servers-"))
        log_dir.mkdir(parents=True, exist_ok=True)
        self._temporary_logs = log_dir if options.log_dir is None else None
        groups = device_groups(options)
        dtype = dtype_name(options, on_cpu=not groups[0])
        self.dtype = stored_dtype(options.model) if dtype == "auto" else dtype
        if not groups[0]:
            note_choice(options, dtype, threads_of_server(options), "each server's")
        self.num_devices = len(groups) * options.tensor_parallel_size
        self._ports = [_reserve_port() for _ in groups]
        self._servers = [
            _Server(
                i,
                f"http://127.0.0.1:{port.getsockname()[1]}/v1",
                *server_command(options, devices, "127.0.0.1", port.getsockname()[1], key),
                log_dir / f"server-{i}.log",
            )
            for i, (port, devices) in enumerate(zip(self._ports, groups, strict=True))
        ]
        # As many again wait at each server, so that a place set free is filled in the same step.
        max_in_flight = 2 * (options.max_num_seqs or (_GPU_MAX_NUM_SEQS if groups[0] else CPU_MAX_NUM_SEQS))
        urls = tuple(server.url for server in self._servers)
        client = replace(options, kind="endpoint", endpoints=urls, max_num_seqs=max_in_flight, num_recurrences=None)
        self._closing = threading.Event()
        self._hang_timeout_s = options.hang_timeout_s
        self._engine = EndpointEngine(client, local_key=key)
        self._watcher = threading.Thread(target=self._watch, name="vllm-servers", daemon=True)
        try:
            for server in self._servers:
                server.start()
            self._watcher.start()
            self._engine.wait_until_open()
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        """See `Engine.generate`."""
        return self._engine.generate(requests)

    def score(self, requests: Iterable[ScoringRequest]) -> Iterator[tuple[ScoringRequest, LogLikelihood | Failure]]:
        """See `Engine.score`."""
        return self._engine.score(requests)

    def update_weights(self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int) -> None:
        """See `Engine.update_weights`. Where the engine is a trainer's, every rank sends to its own servers."""
        if "update_weights" not in self.abilities:
            raise lacking("vllm-server", "update_weights")
        self._engine.update_weights(weights, version)
        self.weight_version = version

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._engine.stats()

    def close(self) -> None:
        """See `Engine.close`."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._engine.close()
        keepers = [server.keeper for server in self._servers if server.keeper is not None]
        for keeper in keepers:
            keeper.terminate()
        for keeper in keepers:
            keeper.wait()
        for port in self._ports:
            port.close()
        if self._temporary_logs is not None:
            shutil.rmtree(self._temporary_logs, ignore_errors=True)

    def _watch(self) -> None:
        try:
            while not self._closing.wait(_POLL_S):
                for server in self._servers:
                    if server.keeper is not None and server.keeper.poll() is not None:
                        self._revive(server)
                    elif self._hangs(server):
                        self._end(server)
        except Exception as error:
            self._engine.fail(error)

    def _hangs(self, server: _Server) -> bool:
        """Whether `server` has had requests for `hang_timeout_s`, and has not processed any of them."""
        now_s = time.monotonic()
        if not self._engine.num_in_flight(server.url):  # as while it starts
            server.last_progress_s = now_s
        elif now_s >= server.next_look_s:
            server.next_look_s = now_s + self._hang_timeout_s / _LOOKS_PER_HANG
            num_tokens = _num_tokens(server.url)
            if num_tokens is not None and num_tokens != server.num_tokens:
                server.num_tokens, server.last_progress_s = num_tokens, now_s
        return now_s - server.last_progress_s > self._hang_timeout_s

    def _end(self, server: _Server) -> None:
        assert server.keeper is not None
        num_requests = self._engine.num_in_flight(server.url)
        logger.warning(
            f"vLLM server {server.number} has written no token for {self._hang_timeout_s:g} s, with {num_requests} "
            "requests; it is ended"
        )
        server.keeper.terminate()
        server.last_progress_s = time.monotonic()

    def _revive(self, server: _Server) -> None:
        """Restart a dead server. Raises EngineError when it never came up, or does nothing but die."""
        assert server.keeper is not None
        num_answers = self._engine.num_answers(server.url)
        server.num_deaths = 1 if num_answers > server.num_answers else server.num_deaths + 1
        server.num_answers = num_answers
        ended = f"vLLM server {server.number} ended with code {server.keeper.returncode}"
        if not self._engine.was_open(server.url):
            raise self._death(server, f"{ended} before it could be asked")
        if server.num_deaths > _MAX_DEATHS_IN_A_ROW:
            raise self._death(server, f"{ended}, {server.num_deaths} times without a completion")
        logger.warning(f"{ended}; it is restarted (its log: {server.log})")
        server.start()

    def _death(self, server: _Server, what: str) -> EngineError:
        self._temporary_logs = None  # someone will want to read them
        return EngineError(f"{what}: {_last_error(server.log)} (its log: {server.log})")


def _num_tokens(url: str) -> float | None:
    """How many tokens of prompts and completions the server at `url` has worked off; None when it does not answer."""
    try:
        with _NO_PROXY.open(url.removesuffix("/v1") + "/metrics", timeout=_METRICS_TIMEOUT_S) as page:
            text = page.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    counts = re.findall(r"^vllm:(?:prompt|generation)_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    if not counts:
        raise EngineError(
            f"{url}: its metrics do not report how many tokens it has generated; use another version of vLLM"
        )
    return sum(map(float, counts))


def _reserve_port() -> socket.socket:
    """A socket whose port no other program is given while it is open: a server is seconds from binding to it, and
    binds to it again after a death. It can, despite this socket, as neither listens yet and both set SO_REUSEADDR."""
    port = socket.socket()
    port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port.bind(("127.0.0.1", 0))
    return port


def _last_error(log: Path) -> str:
    """The line of a server's log that says best why it ended."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [
        f"{line} {following}" if "validation error" in line else line  # pydantic names the field, then says what it is
        for line, following in zip(lines, [*lines[1:], ""], strict=True)
        if re.search(r"(Error|Exception)\b: ", line) and "See root cause above" not in line
    ]
    last = (errors or lines or ["nothing was logged"])[-1]
    return re.sub(r"^\(\S+ pid=\d+\)( \S+ [\d-]+ [\d:]+ \[\S+\])? *", "", last)[:300]
