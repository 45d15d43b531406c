"""Whether the GPUs of this node are fit for a long run: the job behind `tools/check_env.py --gpus`.

One process per GPU, all at once as in training: products of matrices (speed, and the same bits from every GPU each
time), copies within the GPU's memory, and all_reduce over all GPUs. nvidia-smi says how warm they are, whether they
slow down, which memory errors and links they have. Speeds are judged against the data sheet and against the other
GPUs of the node: in training, the slowest of them sets the pace.
"""

import collections
import contextlib
import dataclasses
import logging
import multiprocessing
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_tpt import logs
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.majority import outliers
from megatron_tpt.processes import interrupts_blocked

logger = logging.getLogger(__name__)

# What a fit GPU reaches at least of the peak in its data sheet, of the median of the node, and of its links' speed.
_MATMUL_FLOOR, _MEMORY_FLOOR, _MEDIAN_FLOOR, _LINK_FLOOR = 0.5, 0.7, 0.9, 0.4
# GB/s of memory, from NVIDIA's data sheets. The first name that is part of the device's own counts.
_PEAK_MEMORY_GB_PER_S = {
    "H100 PCIe": 2000.0,
    "H100 NVL": 3900.0,
    "H100": 3350.0,
    "H200": 4800.0,
    "B200": 8000.0,  # GB200 too
    "A100-SXM4-80GB": 2039.0,
    "A100 80GB": 1935.0,
    "A100": 1555.0,
}
_STATE_FIELDS = {
    "temperature_c": "temperature.gpu",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "uncorrected_ecc_errors": "ecc.errors.uncorrected.volatile.total",
    "hardware_slowdown": "clocks_throttle_reasons.hw_slowdown",
    "thermal_slowdown": "clocks_throttle_reasons.sw_thermal_slowdown",
}
_TIMEOUT_S = 180
_NUM_REDUCTIONS = 20


@dataclasses.dataclass(frozen=True)
class Load:
    """How much is measured."""

    matmul_size: int = 8192
    """Rows and columns of the bf16 matrices."""
    copy_bytes: int = 4 << 30
    """Size of what is copied within memory."""
    reduce_bytes: int = 1 << 30
    """Size of what all_reduce adds up."""
    seconds: float = 5.0
    """Time for products of matrices; half of it for copies."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one device."""

    device: str
    """The name that CUDA gives it."""
    matmul_tflops: float
    memory_gb_per_s: float
    """Read and written."""
    digest: int
    """Of the bits of a product of matrices; the same on equal devices."""
    is_stable: bool
    """Whether the product was the same every time."""
    state: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """What nvidia-smi said under load, by the names in _STATE_FIELDS; None for what the device does not report."""
    links_gb_per_s: tuple[float, ...] = ()
    """Speed of every NVLink in one direction, 0 for one that is down."""


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """What was measured of all devices together."""

    bus_gb_per_s: float
    """2 (n - 1) / n times the size over the time: what each device sends, and comparable between numbers of devices."""
    is_right: bool
    """Whether the sum was."""


def parse_state(line: str) -> dict[str, float | None]:
    """A line of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` for the fields of _STATE_FIELDS."""

    def number(text: str) -> float | None:
        if text in ("Active", "Not Active"):
            return float(text == "Active")
        with contextlib.suppress(ValueError):
            return float(text)
        return None  # [N/A], [Not Supported]

    values = [number(text.strip()) for text in line.split(",")]
    return dict(zip(_STATE_FIELDS, values, strict=True))


def parse_links(text: str) -> tuple[float, ...]:
    """What `nvidia-smi nvlink --status` prints of one GPU: GB/s of every link, 0 for an inactive one."""
    return tuple(float(speed or 0) for speed in re.findall(r"Link \d+:\s*(?:([\d.]+) GB/s|<inactive>)", text))


def _speed_problems(
    name: str, unit: str, speeds: Mapping[int, float], peak: float | None, floor: float
) -> Iterator[tuple[int, str]]:
    """Speeds of equal devices that are too low, as pairs of device and problem."""
    median = statistics.median(speeds.values())
    for gpu, speed in speeds.items():
        if peak is not None and speed < floor * peak:
            yield gpu, f"{name} {speed:.0f} {unit}, below {floor:.0%} of the peak {peak:.0f}"
        elif speed < _MEDIAN_FLOOR * median:
            yield gpu, f"{name} {speed:.0f} {unit}, where {median:.0f} is the median of this node"


def _own_problems(one: Measurement) -> Iterator[str]:
    """What is wrong with a device on its own."""
    if not one.is_stable:
        yield "the same product of matrices gave other bits when it was repeated"
    if errors := one.state.get("uncorrected_ecc_errors"):
        yield f"{errors:.0f} memory errors that ECC could not correct"
    for name in ("hardware_slowdown", "thermal_slowdown"):
        if one.state.get(name):
            yield f"{name.replace('_', ' ')} under load, at {one.state.get('temperature_c')} degrees Celsius"
    if down := [i for i, speed in enumerate(one.links_gb_per_s) if speed == 0]:
        yield f"NVLink {', '.join(map(str, down))} of {len(one.links_gb_per_s)} is down"


def _problems_among_equals(device: str, equals: Mapping[int, Measurement]) -> Iterator[tuple[int, str]]:
    """What is wrong with devices of one name, compared with each other."""
    from megatron_tpt.training.metrics import device_peak_tflops

    speeds = {gpu: one.matmul_tflops for gpu, one in equals.items()}
    peak = device_peak_tflops(device, "bf16")
    yield from _speed_problems("matrix products at", "TFLOP/s", speeds, peak, _MATMUL_FLOOR)
    speeds = {gpu: one.memory_gb_per_s for gpu, one in equals.items()}
    peak = next((peak for name, peak in _PEAK_MEMORY_GB_PER_S.items() if name in device), None)
    yield from _speed_problems("memory at", "GB/s", speeds, peak, _MEMORY_FLOOR)
    for gpu in outliers({gpu: one.digest for gpu, one in equals.items()}):
        yield gpu, "a product of matrices has other bits than on most GPUs of its kind"
    for gpu in outliers({gpu: len(one.links_gb_per_s) for gpu, one in equals.items()}):
        yield gpu, "another number of NVLinks than most GPUs of its kind"


def find_problems(measured: Mapping[int, Measurement], all_reduce: AllReduce | None = None) -> list[str]:
    """What is wrong with the devices, each problem in one line; nothing when they are fit."""
    by_device: dict[str, dict[int, Measurement]] = collections.defaultdict(dict)
    found: list[tuple[int, str]] = []
    for gpu, one in measured.items():
        by_device[one.device][gpu] = one
        found += [(gpu, problem) for problem in _own_problems(one)]
    for device, equals in by_device.items():
        found += _problems_among_equals(device, equals)
    problems = [f"GPU {gpu}: {problem}" for gpu, problem in sorted(found)]
    if all_reduce is None:
        return problems
    limit = min(sum(one.links_gb_per_s) for one in measured.values())
    if all_reduce.bus_gb_per_s < _LINK_FLOOR * limit:
        speed = f"{all_reduce.bus_gb_per_s:.0f} GB/s, below {_LINK_FLOOR:.0%} of the {limit:.0f} of a GPU's NVLinks"
        problems.append(f"all_reduce at {speed}")
    return problems if all_reduce.is_right else [*problems, "all_reduce gave a wrong sum"]


def _repeat(call: Callable[[], object], synchronize: Callable[[], object], seconds: float) -> float:
    """Seconds that one call takes when it is repeated for some time."""
    call()
    synchronize()
    begin, num_calls = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(10):
            call()
        synchronize()
        num_calls += 10
    return (time.perf_counter() - begin) / num_calls


@contextlib.contextmanager
def _asking_nvidia_smi(uuid: str, *arguments: str) -> Iterator[list[str]]:
    """Ask nvidia-smi about a GPU while the block runs: what it prints is in the list afterwards, if it knows."""
    answers: list[str] = []
    if not uuid or shutil.which("nvidia-smi") is None:
        yield answers
        return
    command = ["nvidia-smi", *arguments, f"--id=GPU-{uuid}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield answers
    printed, _ = process.communicate(timeout=_TIMEOUT_S / 3)
    if process.returncode:
        logger.warning(f"{' '.join(command)}: {printed.strip()}")
    else:
        answers.append(printed)


def _measure(device: Any, load: Load) -> Measurement:
    """The speeds, results and state of one device: that of this process."""
    import torch

    is_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if is_gpu else (lambda: None)
    uuid = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else ""
    generator = torch.Generator().manual_seed(0)
    shape = (load.matmul_size, load.matmul_size)
    a, b = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    first, last = a @ b, torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=last)

    _repeat(multiply, synchronize, load.seconds / 2)  # until it is warm
    with _asking_nvidia_smi(
        uuid, f"--query-gpu={','.join(_STATE_FIELDS.values())}", "--format=csv,noheader,nounits"
    ) as state:
        matmul_s = _repeat(multiply, synchronize, load.seconds / 2)
    source = torch.zeros(load.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    with _asking_nvidia_smi(uuid, "nvlink", "--status") as links:
        copy_s = _repeat(lambda: target.copy_(source), synchronize, load.seconds / 2)
    return Measurement(
        torch.cuda.get_device_name(device) if is_gpu else "CPU",
        matmul_tflops=2 * load.matmul_size**3 / matmul_s / 1e12,
        memory_gb_per_s=2 * load.copy_bytes / copy_s / 1e9,
        digest=int(first.view(torch.int16).sum()),
        is_stable=torch.equal(first, last),
        state=parse_state(state[0]) if state else {},
        links_gb_per_s=parse_links(links[0]) if links else (),
    )


def _measure_all_reduce(device: Any, load: Load) -> AllReduce:
    import torch

    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values = torch.full((load.reduce_bytes // 4,), float(rank + 1), device=device)
    torch.distributed.all_reduce(values)
    is_right = bool((values == num_ranks * (num_ranks + 1) / 2).all())
    torch.distributed.barrier()
    begin = time.perf_counter()
    for _ in range(_NUM_REDUCTIONS):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    values[0].item()  # waits for the GPU
    seconds = (time.perf_counter() - begin) / _NUM_REDUCTIONS
    return AllReduce(2 * (num_ranks - 1) / num_ranks * load.reduce_bytes / seconds / 1e9, is_right)


def _work(
    rank: int,
    num_devices: int,
    store: Path,
    device_type: str,
    load: Load,
    connection: Connection,
    set_up_logs: Callable[[], None],
) -> None:
    import datetime

    import torch

    set_up_logs()
    try:
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
        if device_type == "cuda":
            torch.cuda.set_device(device)
        connection.send(_measure(device, load))
        if num_devices > 1:
            torch.distributed.init_process_group(
                "nccl" if device_type == "cuda" else "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=num_devices,
                timeout=datetime.timedelta(seconds=_TIMEOUT_S / 2),
            )
            connection.send(_measure_all_reduce(device, load))
            torch.distributed.destroy_process_group()
    except Exception as error:  # of a broken device, of any kind: it is what is looked for
        connection.send(one_line(error, with_kind=True))


def measure_node(
    num_devices: int, device_type: str, load: Load
) -> tuple[dict[int, Measurement], list[AllReduce], list[str]]:
    """Measure all devices of this machine ("cuda", or "cpu") at once, each in a process of its own.

    Returns what was measured of every device, what each measured of all_reduce, and what failed.
    """
    context = multiprocessing.get_context("spawn")
    waiting: dict[Any, int] = {}
    processes = []
    meeting_place = Path(tempfile.mkdtemp(prefix="preflight-"))
    try:
        for rank in range(num_devices):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (rank, num_devices, meeting_place / "store", device_type, load, theirs, logs.for_worker())
            process = context.Process(target=_work, args=arguments)
            with interrupts_blocked():
                process.start()
            processes.append(process)
            theirs.close()
            waiting[ours] = rank
        outcomes = list(_outcomes(waiting, time.monotonic() + _TIMEOUT_S + 4 * load.seconds))
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(meeting_place)
    measured = {rank: outcome for rank, outcome in outcomes if isinstance(outcome, Measurement)}
    together = [outcome for _, outcome in outcomes if isinstance(outcome, AllReduce)]
    failures = [f"GPU {rank}: {outcome}" for rank, outcome in outcomes if isinstance(outcome, str)]
    failures += [f"GPU {rank}: no answer in {_TIMEOUT_S} s" for rank in waiting.values()]
    silent = set(range(num_devices)) - measured.keys() - set(waiting.values())
    if not failures:
        failures += [f"GPU {rank}: its process died" for rank in sorted(silent)]
    return measured, together, failures


def _outcomes(waiting: dict[Any, int], deadline: float) -> Iterator[tuple[int, Any]]:
    """What comes from the ranks on their connections until all have ended or the time is over. Those that have ended
    leave `waiting`."""
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            try:
                yield waiting[connection], connection.recv()  # type: ignore[call-arg, union-attr]
            except EOFError:
                del waiting[connection]


def check_gpus() -> tuple[dict[int, Measurement], AllReduce | None, list[str]]:
    """Measure all GPUs of this machine: what was measured, and the problems. Raises UserError without GPUs."""
    import torch

    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise UserError("there is no GPU that torch can use on this machine: omit --gpus, or look at nvidia-smi")
    measured, together, failures = measure_node(num_gpus, "cuda", Load())
    slowest = min(together, key=lambda one: (one.is_right, one.bus_gb_per_s), default=None)
    return measured, slowest, failures + find_problems(measured, slowest)


def table(measured: Mapping[int, Measurement], all_reduce: AllReduce | None) -> Iterator[str]:
    """What was measured, in lines."""
    for gpu, one in sorted(measured.items()):
        state = "  ".join(f"{name} {value:g}" for name, value in one.state.items() if value is not None)
        links = f"{len(one.links_gb_per_s)} NVLinks, {sum(one.links_gb_per_s):.0f} GB/s"
        yield (
            f"GPU {gpu}  {one.device}: {one.matmul_tflops:.0f} TFLOP/s (bf16), memory {one.memory_gb_per_s:.0f} GB/s, "
            f"{links}  {state}"
        )
    if all_reduce is not None:
        yield f"all_reduce over {len(measured)} GPUs: {all_reduce.bus_gb_per_s:.1f} GB/s (bus)"
