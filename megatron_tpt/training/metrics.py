"""The metrics that training reports, as pure functions of measured values."""

from collections.abc import Sequence

import numpy as np

# Dense peaks of the matrix units in TFLOP/s, bf16 and FP8, from NVIDIA's data sheets (which state twice as much, for
# sparse matrices). The first name contained in the device's name is used.
_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H100 PCIe": {"bf16": 756.5, "fp8": 1513.0},
    "H100 NVL": {"bf16": 835.5, "fp8": 1670.5},
    "H200 NVL": {"bf16": 835.5, "fp8": 1670.5},
    "H100": {"bf16": 989.4, "fp8": 1978.9},
    "H200": {"bf16": 989.4, "fp8": 1978.9},
    "GB200": {"bf16": 2500.0, "fp8": 5000.0},
    "B200": {"bf16": 2250.0, "fp8": 4500.0},
    "A100": {"bf16": 312.0},
}


def device_peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in "bf16" or "fp8", by the name that CUDA gives it; None when it is not known."""
    for name, peaks in _PEAK_TFLOPS.items():
        if name in device_name:
            return peaks.get(precision)
    return None


def step_times(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median, 95th percentile (linear between the two nearest) and maximum of the wall times of some steps."""
    p50, p95 = np.percentile(seconds, [50, 95])
    return {
        "step_s": sum(seconds) / len(seconds),
        "step_p50_s": float(p50),
        "step_p95_s": float(p95),
        "step_max_s": max(seconds),
    }


def remaining_s(num_steps_left: int, elapsed_s: float, num_steps_done: int) -> float:
    """Time until the end at the pace of the last steps; elapsed_s is their wall time, including validation and
    checkpoints in between."""
    return num_steps_left * elapsed_s / num_steps_done


def throughput(
    num_tokens: int,
    seconds: float,
    data_wait_s: float,
    *,
    flops_per_token: float,
    num_devices: int,
    peak_tflops: float | None,
) -> dict[str, float]:
    """Throughput over an interval of training steps (checkpoints and validation not included).

    num_tokens counts all processes, seconds and data_wait_s are wall time. `tflops_per_device` is model FLOP/s (see
    models.sizes.model_flops_per_token) over the devices; `mfu` divides it by peak_tflops, the dense peak of one device.
    """
    tokens_per_s = num_tokens / seconds
    tflops = tokens_per_s * flops_per_token / num_devices / 1e12
    result = {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / num_devices,
        "tflops_per_device": tflops,
        "data_wait_s": data_wait_s,
        "data_wait_fraction": data_wait_s / seconds,
    }
    if peak_tflops is not None:
        result["mfu"] = tflops / peak_tflops
    return result
