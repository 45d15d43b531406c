"""The control of servers whose weights are updated: what they are asked, in which order, and what is refused.

Their answers are those of vLLM 0.32; tests/generation/test_update_weights.py has a real server.
"""

import base64
import contextlib
import itertools
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from safetensors.torch import load_file, save_file
from unruly_server import MODEL, UnrulyServer

from megatron_tpt.errors import UserError
from megatron_tpt.generation import (
    Completion,
    EngineError,
    EngineOptions,
    Sampling,
    complete,
    open_engine,
    servers_apart,
)
from megatron_tpt.generation.openai_api import read_completion
from megatron_tpt.generation.server_weights import Control, ServerWeights, write_folder

KEY = "secret"


@dataclass
class Server:
    """Answers the routes for updates as vLLM does."""

    size: int = 1
    """GPUs."""
    label: str = "default"
    asked: list[tuple[str, Any]] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    """Other answers than vLLM's: the body, or a status."""
    port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, path: str, body: Any) -> Any:
        if path in self.answers:
            return self.answers[path]
        if path == "update_weight_version":
            self.label = body["new_version"]
        known = {"weight_info": {"weight_version": self.label}, "get_world_size": {"world_size": self.size}}
        return known.get(path, {"success": True})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._do(None)

            def do_POST(self) -> None:
                self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _do(self, body: Any) -> None:
                path = self.path[1:]
                if body is not None:
                    outer.asked.append((path, body))
                given = self.headers["Authorization"]
                answer = outer.answer(path, body) if given == f"Bearer {KEY}" else 401
                is_status = isinstance(answer, int)
                self.send_response(answer if is_status else 200)
                self.end_headers()
                self.wfile.write(b"no" if is_status else json.dumps(answer).encode())

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    both = [Server(size=2), Server()]
    with both[0].running(), both[1].running():
        yield both


WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def sender(servers: list[Server], tmp_path: Path) -> ServerWeights:
    return make_sender(servers, tmp_path)


def make_sender(servers: list[Server], folder: Path, key: str = KEY, patience_s: float = 0.1) -> ServerWeights:
    (folder / "model").mkdir()
    save_file(WEIGHTS, folder / "model/model.safetensors")
    options = EngineOptions(
        str(folder / "model"),
        kind="endpoint",
        endpoints=tuple(f"{server.url}/v1" for server in servers),
        endpoint_patience_s=patience_s,
        weight_transfer="folder",
        weights_dir=folder / "weights",
    )
    return ServerWeights(options, key, is_shared=True)


def update(sender: ServerWeights, version: int, weights: dict[str, torch.Tensor] = WEIGHTS) -> None:
    sender.update(iter(weights.items()), version, lambda: None)


def test_servers_are_paused_get_the_folder_empty_their_cache_and_take_the_version(
    servers: list[Server], sender: ServerWeights, tmp_path: Path
) -> None:
    for version in (3, 4):
        update(sender, version)
        folder = tmp_path / f"weights/version_{version:08d}"
        for server in servers:
            assert server.asked == [
                ("pause?mode=abort", {}),
                ("collective_rpc", {"method": "reload_folder", "args": [str(folder)]}),
                ("reset_prefix_cache", {}),
                ("update_weight_version", {"new_version": str(version)}),
                ("resume", {}),
            ]
            server.asked.clear()
        assert [one.name for one in folder.parent.iterdir()] == [folder.name], "one version at a time"
    [file] = folder.iterdir()
    torch.testing.assert_close(load_file(file), WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("reset_prefix_cache", {"success": False}, "does not empty its prefix cache"),
        (
            "update_weight_version",
            {"success": True},
            "servers say versions 3, default of their weights after version 3",
        ),
        ("collective_rpc", 500, r"collective_rpc answered 500 \(no\)"),
    ],
)
def test_a_server_that_does_not_take_the_weights_is_an_error_and_nothing_stays_paused(
    path: str, answer: Any, message: str, servers: list[Server], sender: ServerWeights
) -> None:
    servers[1].answers[path] = answer
    with pytest.raises(EngineError, match=message):
        update(sender, 3)
    assert [server.asked[-1][0] for server in servers] == ["resume", "resume"]


@pytest.mark.parametrize("given", [{"a": WEIGHTS["a"]}, WEIGHTS | {"c": torch.ones(1)}])
def test_weights_that_are_not_whole_are_not_sent(
    given: dict[str, torch.Tensor], servers: list[Server], sender: ServerWeights
) -> None:
    with pytest.raises(EngineError, match=r"the update lacks .* weights* unknown to it: [bc]"):
        update(sender, 3, given)
    assert not servers[0].asked and not servers[1].asked


def test_weights_are_iterated_to_the_end_where_they_cannot_be_written(sender: ServerWeights, tmp_path: Path) -> None:
    """Else the other ranks would wait for this one."""
    (tmp_path / "weights").write_text("a file")
    tensors = iter([("a", torch.ones(1)), ("b", torch.ones(1))])
    with pytest.raises(EngineError, match="weights cannot be sent"):
        sender.update(tensors, 3, lambda: None)
    assert next(tensors, None) is None


def test_large_weights_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tpt.generation.server_weights._MAX_FILE_BYTES", 20)
    assert write_folder(tmp_path / "version_1", WEIGHTS.items()) == {"a", "b"}
    parts = [load_file(path) for path in sorted((tmp_path / "version_1").iterdir())]
    assert [list(part) for part in parts] == [["a"], ["b"]]


@pytest.mark.parametrize(("key", "status"), [("other", 401), (KEY, 404)])
def test_a_server_that_was_not_started_for_updates_is_a_mistake_of_the_user(
    key: str, status: int, servers: list[Server], tmp_path: Path
) -> None:
    servers[0].answers["weight_info"] = status
    with pytest.raises(UserError, match=f"weight_info answered {status} .*was not started for updates"):
        update(make_sender(servers, tmp_path, key), 3)


def test_a_server_that_is_away_is_waited_for(servers: list[Server], tmp_path: Path) -> None:
    late = Server()
    sender = make_sender([*servers, late], tmp_path, patience_s=60)
    looks = itertools.count()
    with contextlib.ExitStack() as stack:
        sender.update(WEIGHTS.items(), 3, lambda: stack.enter_context(late.running()) if next(looks) == 0 else None)
        assert late.label == "3"


def test_a_server_that_does_not_come_is_an_error(servers: list[Server], tmp_path: Path) -> None:
    sender = make_sender([*servers, Server()], tmp_path)
    with pytest.raises(EngineError, match="weight_info cannot be asked"):
        update(sender, 3)
    assert not servers[0].asked


def test_the_gpus_of_each_server_have_ranks_of_their_own(servers: list[Server]) -> None:
    control = Control([server.url for server in servers], KEY, 10)
    assert control.world_sizes() == [2, 1]
    control.init_weight_transfer_engine({"master_port": 5, "rank_offset": 1})
    given = [server.asked[-1][1]["init_info"] for server in servers]
    assert given == [{"master_port": 5, "rank_offset": 1}, {"master_port": 5, "rank_offset": 3}]
    address, port = control.own_address()
    assert address == "127.0.0.1" and port > 0


def test_handles_of_memory_are_pickled(servers: list[Server]) -> None:
    control = Control([servers[0].url], KEY, 10)
    handles = [{"gpu": (len, ("x",))}]
    control.update_weights({"names": ["a"], "ipc_handles": handles})
    path, body = servers[0].asked[-1]
    assert path == "update_weights" and body["update_info"]["names"] == ["a"]
    assert pickle.loads(base64.b64decode(body["update_info"]["ipc_handles_pickled"])) == handles


@pytest.mark.parametrize(
    ("spans", "version"),
    [
        ([{"version": "7", "start": 0, "end": 1}], 7),
        ([{"version": "default", "start": 0, "end": 1}], 0),
        ([{"version": "of somebody else", "start": 0, "end": 1}], -1),
    ],
)
def test_a_completion_has_the_version_of_its_weights(spans: list[dict[str, Any]], version: int) -> None:
    completion = read_completion("url", answer(spans), with_log_probabilities=True, with_weight_version=True)
    assert isinstance(completion, Completion)
    assert (completion.weight_version, completion.token_ids, completion.log_probabilities) == (version, (5,), (-0.5,))


def test_a_completion_of_several_weights_is_none() -> None:
    spans = [{"version": str(version), "start": 0, "end": 1} for version in (1, 2)]
    with pytest.raises(ValueError, match="too many values"):
        read_completion("url", answer(spans), with_weight_version=True)


def answer(spans: list[dict[str, Any]]) -> dict[str, Any]:
    """What vLLM answers to /inference/v1/generate."""
    choice = {"text": "a", "token_ids": [5], "finish_reason": "length", "weight_versions": spans}
    choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}


@pytest.mark.parametrize(
    ("place", "num_places", "asked"), [(0, 1, [0, 1]), (0, 2, [0]), (1, 2, [1]), (2, 3, [0]), (1, 3, [1])]
)
def test_servers_are_asked_apart_each_by_some_place(place: int, num_places: int, asked: list[int]) -> None:
    both = [UnrulyServer(owner="vllm") for _ in range(2)]
    for server in both:
        server.start()
    options = EngineOptions(MODEL, kind="endpoint", endpoints=tuple(server.url for server in both))
    with (
        open_engine(options) as engine,
        servers_apart(engine, place, num_places) as engines,
    ):
        for one in engines:
            complete(one, ["a", "b"], Sampling(max_new_tokens=3))
    assert [i for i, server in enumerate(both) if server.bodies] == asked
    for server in both:
        server.stop()


class Described:
    """WEIGHTS, described."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(WEIGHTS.items())

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in WEIGHTS.items()]


@pytest.mark.slow(minutes=1)
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_vllm_own_trainer_side_drives_the_four_phases(
    backend: Any, servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the GPU's part, which takes the tensors here: NCCL's broadcast, and the handles of memory."""
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    sent: list[tuple[str, torch.Tensor]] = []

    def take(iterator: Iterator[tuple[str, torch.Tensor]], **_: Any) -> list[Any]:
        sent.extend(iterator)
        return []

    opened: list[Any] = []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info) or opened)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", take)
    monkeypatch.setattr(ipc_engine, "packed_ipc_producer", take)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Server())
    monkeypatch.setattr(Server, "uuid", "gpu", raising=False)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    sender = make_sender(servers, tmp_path)
    sender._options = options = EngineOptions(
        sender._options.model, kind="endpoint", endpoints=sender._options.endpoints, weight_transfer=backend
    )
    assert options.weights_dir is None

    def phases(server: Server) -> list[str]:
        paths = [path for path, _ in server.asked]
        server.asked.clear()
        return paths

    connected = ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]
    update_paths = ["update_weights"] if backend == "nccl" else []
    whole = ["pause?mode=abort", "start_weight_update", *update_paths, "finish_weight_update"]
    whole += ["reset_prefix_cache", "update_weight_version", "resume"]

    def send(version: int) -> list[list[str]]:
        sender.update(Described(), version, lambda: None)
        assert [name for name, _ in sent] == list(WEIGHTS)
        sent.clear()
        return [phases(server) for server in servers]

    assert send(0) == [[*connected, *whole]] * 2
    assert send(1) == [whole] * 2, "the connection stays"
    servers[1].label = "default"  # it was restarted
    assert send(2) == [[*connected, *whole]] * 2
    if backend == "nccl":
        assert [info.world_size for info in opened] == [4, 4]
