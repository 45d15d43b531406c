"""Other weights for vLLM servers that run, over the routes that they have for it (vLLM's dev mode).

    folder  the weights as safetensors files, which every server reads: works everywhere, also on CPUs
    nccl    vLLM's four phases, with a broadcast from the first rank to servers on GPUs of their own
    ipc     vLLM's four phases, with the memory of the GPU that a rank and its server share

Under all of them a server is paused meanwhile, then empties its prefix cache, and takes the version, which it reports
with every completion. A server that was restarted has the weights it was started with, under another version.
"""

import base64
import collections
import concurrent.futures
import contextlib
import http.client
import json
import pickle
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_tpt.errors import UserError, one_line
from megatron_tpt.files import atomic_directory
from megatron_tpt.generation.api import DescribedWeights, EngineError, EngineOptions
from megatron_tpt.generation.models import quiet, require_all_weights, weight_shapes
from megatron_tpt.names import shown

if TYPE_CHECKING:
    import torch

_MAX_FILE_BYTES = 5_000_000_000
_POLL_S = 0.5
_MAX_SHOWN = 300
_LOOK_TIMEOUT_S = 10.0


class ServerWeights:
    """Sends weights to the servers at `options.endpoints`.

    In a trainer of several processes all call `update`. `is_shared`: all use the same servers, to which the first
    sends; else each sends to its own.
    """

    def __init__(self, options: EngineOptions, key: str | None, *, is_shared: bool) -> None:
        import torch.distributed

        self._options = options
        self._is_distributed = torch.distributed.is_initialized()
        self._is_first = not self._is_distributed or torch.distributed.get_rank() == 0
        self._is_sender = self._is_first or not is_shared
        self._control = Control([url.removesuffix("/v1") for url in options.endpoints], key, options.request_timeout_s)
        self._transfer: _Transfer | None = None

    def update(
        self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int, require_hope: Callable[[], None]
    ) -> None:
        """Send `weights`, which all ranks iterate to the end, as version `version`. Servers that do not answer are
        waited for while `require_hope` raises nothing. Raises EngineError where that fails, on the sender alone."""
        if self._options.weight_transfer == "folder":
            folder = self._folder_of_first_rank(weights, version)
            if self._is_sender:
                self._control.wait(self._options.endpoint_patience_s, require_hope)
                with self._control.paused():
                    self._control.on_all("collective_rpc", {"method": "reload_folder", "args": [str(folder)]})
                    self._control.accept(version)
        elif self._is_sender:
            self._send(weights, version, require_hope)

    def _folder_of_first_rank(self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int) -> Path:
        """The folder that the first rank has written, and others then see."""
        assert self._options.weights_dir is not None
        folder, fault = self._options.weights_dir / f"version_{version:08d}", ""
        try:
            if self._is_first:
                names = write_folder(folder, weights)
                require_all_weights(self._options.model, set(weight_shapes(self._options.model)), names)
        except Exception as error:
            fault = one_line(error)
        collections.deque(weights, maxlen=0)  # gathering them takes all ranks
        if self._is_distributed:
            from megatron_tpt import platform

            fault = platform.from_first_rank(lambda: fault)
        if fault:
            raise EngineError(f"weights cannot be sent: {fault}")
        return folder

    def _send(
        self, weights: "Iterable[tuple[str, torch.Tensor]]", version: int, require_hope: Callable[[], None]
    ) -> None:
        """By vLLM's own trainer side. Its connection stays, until an update fails or a server is restarted."""
        assert hasattr(weights, "metadata"), f"{type(weights)} are not described"
        described: DescribedWeights = weights  # type: ignore[assignment]
        names = {name for name, _, _ in described.metadata()}
        require_all_weights(self._options.model, set(weight_shapes(self._options.model)), names)
        self._control.wait(self._options.endpoint_patience_s, require_hope)
        transfer, self._transfer = self._transfer, None
        if transfer is None or set(self._control.labels()) != {transfer.label}:
            transfer = _Transfer(self._options, self._control)
        with self._control.paused():
            transfer.send(described)
            self._control.accept(version)
        transfer.label, self._transfer = str(version), transfer


class _Transfer:
    """A connection of vLLM's trainer side with the servers."""

    def __init__(self, options: EngineOptions, control: "Control") -> None:
        with quiet():
            from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        class Source(WeightSource):
            weights: DescribedWeights

            def metadata(self) -> list[Any]:
                return [ParamMeta(*one) for one in self.weights.metadata()]

            def __iter__(self) -> "Iterator[tuple[str, torch.Tensor]]":
                return iter(self.weights)

        self.label: str | None = None
        """What its servers call the weights that it sent last."""
        self._source = Source()
        with contextlib.suppress(EngineError):  # what is left of a connection before
            control.on_all("shutdown_weight_transfer_engine")
        # Every rank that sends is the first of its own transfer.
        self._sender = WeightTransferTrainerFactory.trainer_init(
            _ipc_info() if options.weight_transfer == "ipc" else _nccl_info(control),
            client=control,
            source=self._source,
        )

    def send(self, weights: DescribedWeights) -> None:
        self._source.weights = weights
        self._sender.send_weights()


def _ipc_info() -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=0, packed=True)


def _nccl_info(control: "Control") -> Any:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    address, port = control.own_address()
    return NCCLTrainerInitInfo(address, port, 1 + sum(control.world_sizes()), rank=0)


class Control:
    """The control plane of several servers, asked all at once; also vLLM's VLLMWeightSyncClient of them."""

    def __init__(self, urls: Sequence[str], key: str | None, timeout_s: float) -> None:
        self._urls, self._key, self._timeout_s = list(urls), key, timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def wait(self, patience_s: float, require_hope: Callable[[], None] = lambda: None) -> None:
        """Wait until all servers answer. Raises EngineError when one does not for `patience_s`, and UserError for one
        that has no such routes."""
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                self.labels(_LOOK_TIMEOUT_S)
                return
            except EngineError:
                require_hope()
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(_POLL_S)

    def labels(self, timeout_s: float | None = None) -> list[str]:
        """What the servers call their weights; "default" when they were just started."""
        return self._each(lambda url: str(self._ask(url, "weight_info", timeout_s=timeout_s)["weight_version"]))

    def world_sizes(self) -> list[int]:
        """How many GPUs each server computes on."""
        return self._each(lambda url: int(self._ask(url, "get_world_size")["world_size"]))

    def own_address(self) -> tuple[str, int]:
        """An address of this machine by which the servers can reach it, and a port that is free."""
        parts = urlsplit(self._urls[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing
            address: str = probe.getsockname()[0]
        with socket.socket() as listener:
            listener.bind(("", 0))
            return address, listener.getsockname()[1]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is computed in the block: what was in flight is abandoned, and ended."""
        try:
            self.on_all("pause?mode=abort")
            yield
        finally:
            self.on_all("resume")

    def accept(self, version: int) -> None:
        """End an update: no keys and values of the old weights are left, and the servers say `version`."""
        if not all(answer["success"] for answer in self.on_all("reset_prefix_cache")):
            raise EngineError("vLLM does not empty its prefix cache, which holds keys and values of the old weights")
        self.on_all("update_weight_version", {"new_version": str(version)})
        if set(found := self.labels()) != {str(version)}:
            raise EngineError(f"servers say versions {', '.join(found)} of their weights after version {version}")

    def on_all(self, path: str, body: Any = None) -> list[Any]:
        """What every server answers to a POST."""
        return self._each(lambda url: self._ask(url, path, {} if body is None else body))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See VLLMWeightSyncClient: the GPUs of each server follow those of the servers before it."""
        infos = {url: dict(init_info) for url in self._urls}
        if "rank_offset" in init_info:
            offset = init_info["rank_offset"]
            for url, size in zip(self._urls, self.world_sizes(), strict=True):
                infos[url]["rank_offset"], offset = offset, offset + size
        self._each(lambda url: self._ask(url, "init_weight_transfer_engine", {"init_info": infos[url]}))

    def start_weight_update(self) -> None:
        """See VLLMWeightSyncClient."""
        self.on_all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See VLLMWeightSyncClient. Handles of a GPU's memory are no JSON: vLLM takes them pickled."""
        if (handles := update_info.get("ipc_handles")) is not None:
            pickled = base64.b64encode(pickle.dumps(handles)).decode()
            update_info = {name: value for name, value in update_info.items() if name != "ipc_handles"}
            update_info["ipc_handles_pickled"] = pickled
        self.on_all("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See VLLMWeightSyncClient."""
        self.on_all("finish_weight_update")

    def _each[T](self, ask: Callable[[str], T]) -> list[T]:
        with concurrent.futures.ThreadPoolExecutor(len(self._urls)) as pool:
            return list(pool.map(ask, self._urls))

    def _ask(self, url: str, path: str, body: Any = None, timeout_s: float | None = None) -> Any:
        """The answer to a GET, or to a POST of `body`."""
        address = f"{url}/{path}"
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, headers)
        try:
            with self._opener.open(request, timeout=timeout_s or self._timeout_s) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = shown(" ".join(error.read().decode("utf-8", "replace").split()))[:_MAX_SHOWN]
            if error.code in (401, 403, 404, 405):
                raise UserError(
                    f"{address} answered {error.code} ({said}): its server was not started for updates of its weights, "
                    "or with another key; see docs/rl.md"
                ) from error
            raise EngineError(f"{address} answered {error.code} ({said})") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise EngineError(f"{address} cannot be asked ({one_line(error)})") from error


def write_folder(folder: Path, weights: "Iterable[tuple[str, torch.Tensor]]") -> set[str]:
    """Write the weights as safetensors, all or nothing, in place of those of other versions next to it. Returns their
    names."""
    from safetensors.torch import save_file

    names: set[str] = set()
    batch: dict[str, torch.Tensor] = {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.glob("version_*"):
        shutil.rmtree(other, ignore_errors=True)
    with atomic_directory(folder) as temporary:

        def flush() -> None:
            save_file(batch, temporary / f"{len(names):06d}.safetensors", metadata={"format": "pt"})
            batch.clear()

        for name, tensor in weights:
            batch[name] = tensor.cpu()
            names.add(name)
            if sum(one.nbytes for one in batch.values()) >= _MAX_FILE_BYTES:
                flush()
        if batch:
            flush()
    return names
