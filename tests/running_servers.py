"""The vLLM servers that run below this process."""

import psutil


def newest_server() -> psutil.Process:
    """The one that was started last."""
    servers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "vllm.entrypoints.openai.api_server" in process.cmdline()
        and "megatron_tpt.generation.keeper" not in process.cmdline()
    ]
    return max(servers, key=psutil.Process.create_time)
