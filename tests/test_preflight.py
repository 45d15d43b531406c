"""Whether the GPUs of a node are fit: what nvidia-smi prints is read, measurements are taken and judged."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tpt import preflight
from megatron_tpt.preflight import AllReduce, Load, Measurement, find_problems, parse_links, parse_state

FIT = Measurement(
    "NVIDIA H100 80GB HBM3",
    matmul_tflops=700.0,
    memory_gb_per_s=2900.0,
    digest=12345,
    is_stable=True,
    state=parse_state("61, 1590, 1980, 688.25, 700.00, 0, Not Active, Not Active"),
    links_gb_per_s=(26.562,) * 18,
)


def test_what_nvidia_smi_prints_is_read() -> None:
    assert FIT.state["temperature_c"] == 61 and FIT.state["power_w"] == 688.25
    assert FIT.state["hardware_slowdown"] == 0 and FIT.state["max_sm_clock_mhz"] == 1980
    other = parse_state("38, 1410, 1410, [N/A], [Not Supported], [N/A], Active, Not Active")
    assert other["power_w"] is None and other["uncorrected_ecc_errors"] is None and other["hardware_slowdown"] == 1
    printed = (
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1b9f2c7e)\n"
        "\t Link 0: 26.562 GB/s\n\t Link 1: 26.562 GB/s\n\t Link 2: <inactive>\n\t Link 10: 25 GB/s\n"
    )
    assert parse_links(printed) == (26.562, 26.562, 0.0, 25.0)
    assert parse_links("") == ()


def test_a_fit_node_has_no_problems() -> None:
    assert find_problems({gpu: FIT for gpu in range(8)}, AllReduce(370.0, True)) == []
    unknown = dataclasses.replace(FIT, device="NVIDIA XYZ", matmul_tflops=1.0, memory_gb_per_s=1.0, state={})
    assert find_problems({0: unknown}) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"matmul_tflops": 600.0}, "matrix products at 600 TFLOP/s, where 700 is the median of this node"),
        ({"matmul_tflops": 400.0}, "matrix products at 400 TFLOP/s, below 50% of the peak 989"),
        ({"memory_gb_per_s": 2000.0}, "memory at 2000 GB/s, below 70% of the peak 3350"),
        ({"digest": 12346}, "a product of matrices has other bits than on most GPUs of its kind"),
        ({"is_stable": False}, "the same product of matrices gave other bits when it was repeated"),
        ({"links_gb_per_s": (26.562,) * 17 + (0.0,)}, "NVLink 17 of 18 is down"),
        ({"links_gb_per_s": (26.562,) * 16}, "another number of NVLinks than most GPUs of its kind"),
        ({"state": {"uncorrected_ecc_errors": 2.0}}, "2 memory errors that ECC could not correct"),
        (
            {"state": {"thermal_slowdown": 1.0, "temperature_c": 92.0}},
            "thermal slowdown under load, at 92.0 degrees Celsius",
        ),
    ],
)
def test_an_unfit_gpu_is_named(changes: dict, problem: str) -> None:
    measured = {gpu: FIT for gpu in range(4)} | {2: dataclasses.replace(FIT, **changes)}
    assert find_problems(measured, AllReduce(370.0, True)) == [f"GPU 2: {problem}"]


def test_slow_links_and_wrong_sums_are_found() -> None:
    slow = "all_reduce at 20 GB/s, below 40% of the 478 of a GPU's NVLinks"
    assert find_problems({0: FIT, 1: FIT}, AllReduce(20.0, False)) == [slow, "all_reduce gave a wrong sum"]
    assert len(find_problems({0: FIT, 1: dataclasses.replace(FIT, digest=1)})) == 2  # of two, none is known to be right


def test_devices_are_measured_side_by_side() -> None:
    load = Load(matmul_size=64, copy_bytes=1 << 16, reduce_bytes=1 << 16, seconds=0.05)
    measured, together, failures = preflight.measure_node(2, "cpu", load)
    assert failures == [] and measured.keys() == {0, 1}
    assert measured[0].digest == measured[1].digest != 0 and all(one.is_stable for one in measured.values())
    assert all(one.matmul_tflops > 0 and one.memory_gb_per_s > 0 for one in measured.values())
    assert [one.is_right for one in together] == [True, True] and all(one.bus_gb_per_s > 0 for one in together)
    assert not [line for line in find_problems(measured, together[0]) if "bits" in line or "sum" in line]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_a_machine_without_gpus_is_an_error_that_says_so() -> None:
    tool = Path(__file__).parents[1] / "tools" / "check_env.py"
    result = subprocess.run([sys.executable, str(tool), "--gpus"], capture_output=True, text=True)
    assert result.returncode == 2 and "Megatron Core" in result.stdout
    assert result.stderr.startswith("error: there is no GPU") and result.stderr.count("\n") == 1
