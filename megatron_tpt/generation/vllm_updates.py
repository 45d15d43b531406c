"""What vLLM servers get from us, so that their weights can be updated: a method of their workers, and access control.

vLLM's key protects only what OpenAI's protocol has. Its routes for updates run what they are told, and must not be open
to other users of the machine or the network.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tpt.generation.api import EngineOptions

if TYPE_CHECKING:
    import torch

_OPEN = ("/health", "/metrics")


def update_arguments(options: EngineOptions) -> tuple[dict[str, Any], dict[str, str]]:
    """Arguments and environment of a server whose weights can be updated; nothing without a transfer."""
    if options.weight_transfer is None:
        return {}, {}
    arguments: dict[str, Any] = {
        "enable_scale_out": True,  # completions with the version of the weights
        "middleware": f"{__name__}.RequireKey",
        "worker_extension_cls": f"{__name__}.FolderReload",
    }
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if options.weight_transfer != "folder":
        arguments["weight_transfer_config"] = {"backend": options.weight_transfer}
    if options.weight_transfer == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of memory come pickled
    return arguments, environment


class FolderReload:
    """Mixed into vLLM's workers, which are asked by name over HTTP (collective_rpc)."""

    def reload_folder(self, folder: str) -> None:
        """Replace the model's weights by those in the safetensors files of `folder`."""
        self.reload_weights(weights_iterator=_tensors(Path(folder)))  # type: ignore[attr-defined]
        repack_tied_head(self)


def repack_tied_head(worker: Any) -> None:
    """Renew what vLLM keeps of an output layer that shares the embedding's weights.

    On CPUs it packs a copy for its matrix product when it loads a model, but not when it reloads one (0.32).
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    model = worker.model_runner.get_model()
    if current_platform.is_cpu() and model.config.tie_word_embeddings:
        dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def _tensors(folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


class RequireKey:
    """Refuses whoever does not send the server's key, whatever is asked, in the form that servers load (ASGI)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"the key is missing or wrong"})
                return
        await self._app(scope, receive, send)
