"""Suppresses messages of libraries that every start would print and that need no action. All others are shown."""

import logging
import warnings
from collections.abc import Callable

_LOG_MESSAGES = {
    "megatron.core.tensor_parallel.random": "CPU RNG state changed within GPU RNG context",  # on a CPU they are one
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # printed only on a CPU, where it is expected
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # its successor is for hybrid models
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",  # it is computed correctly
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",  # its queue is not used
    "megatron.core.dist_checkpointing.strategies.base": "MCore's async save is deprecated",
}


def _leave_out(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()


def silence_known_messages(*, on_cpu: bool) -> None:
    """Suppress the messages above, torch's deprecation warnings about Megatron Core's calls and, on a CPU, Megatron
    Core's warnings, which are all about missing GPU kernels (tools/check_env.py says what that costs)."""
    for logger_name, text in _LOG_MESSAGES.items():
        logging.getLogger(logger_name).addFilter(_leave_out(text))
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # Megatron Core's loading of checkpoints uses a deprecated interface of torch.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    if on_cpu:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
