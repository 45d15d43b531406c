"""How vLLM servers are started, on GPUs too: none is started here."""

from pathlib import Path

import pytest
from tiny_models import make_model

from megatron_tpt.errors import UserError
from megatron_tpt.generation import EngineOptions, vllm_command
from megatron_tpt.generation.vllm_command import device_groups, num_gpus, server_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def test_gpus_are_shared_among_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_command, "_is_vllm_for_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert num_gpus() == 4
    options = EngineOptions("model", kind="vllm-server", tensor_parallel_size=2)
    assert device_groups(options) == ["4,5", "6,7"]
    with pytest.raises(UserError, match="3 servers of 2 GPUs need 6, but 4 are visible"):
        device_groups(EngineOptions("model", kind="vllm-server", tensor_parallel_size=2, num_engines=3))


@pytest.mark.parametrize("transfer", [None, "folder", "nccl", "ipc"])
def test_a_server_on_gpus_is_started_for_the_transfer_of_its_weights(
    transfer: str | None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OPENAI_API_KEY": "ours", "RANK": "1", "MASTER_PORT": "5", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    options = EngineOptions(
        model, 64, kind="vllm-server", weight_transfer=transfer, weights_dir=tmp_path, gpu_memory=0.3
    )
    command, environment = server_command(options, "2", "0.0.0.0", 8000, "secret")
    arguments = " ".join(command)
    assert "--gpu-memory-utilization 0.3" in arguments and environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment["VLLM_API_KEY"] == "secret"
    assert not {"OPENAI_API_KEY", "RANK", "MASTER_PORT", "LOCAL_RANK"} & environment.keys()
    assert ("--enable-scale-out" in command and "--middleware" in command) == (transfer is not None)
    assert (environment.get("VLLM_SERVER_DEV_MODE") == "1") == (transfer is not None)
    assert (f'--weight-transfer-config {{"backend": "{transfer}"}}' in arguments) == (transfer in ("nccl", "ipc"))
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in environment) == (transfer == "ipc")
