"""Published throughput against what the simulator expects.

    python -m megatron_tpt.planning.published     # the table of docs/planning.md

published.yaml has the figures, each with its source. The constants of planning/machine.py are fitted to the rows with
`fit`, by planning/fit.py; the others test them.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tpt.config.load import read_yaml, recipe_from_dict
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.logs import print_result
from megatron_tpt.markdown import table
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.planning.machine import Machine, machine_named
from megatron_tpt.planning.step import Software, estimate

TOLERANCE = 0.15
"""A row whose throughput differs by more is missed."""
NEMO = Software(tensor_overlap=True, gradient_bytes=2)
"""How the published runs communicate: tp_comm_overlap, and gradients reduced in bf16 (their configurations)."""

_FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Published:
    """A published figure."""

    source: str
    model: str
    precision: str
    gpus: int
    batch: int
    """Samples of a step."""
    length: int = 8192
    """Tokens of a sample."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vp: int = 1
    end_layers: int | None = None
    """Layers of the first and of the last pipeline stage, where they have fewer."""
    fsdp: bool = False
    """Whether parameters are sharded."""
    fit: bool = False
    """Whether the constants are fitted to it."""
    step_s: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None
    assumed: str | None = None
    """The field of the layout that the source does not give."""

    def recipe(self) -> Recipe:
        """The run as a recipe of ours."""
        raw: dict[str, Any] = {
            "model": _content()["models"][self.model],
            "training": {
                "sequence_length": self.length,
                "global_batch_size": self.batch,
                "fp8": "none" if self.precision == "bf16" else "tensorwise",
            },
            "parallel": {
                "tensor_parallel_size": self.tp,
                "sequence_parallel": self.tp > 1,
                "pipeline_parallel_size": self.pp,
                "context_parallel_size": self.cp,
                "virtual_pipeline_parallel_size": self.vp,
                "first_stage_layers": self.end_layers,
                "last_stage_layers": self.end_layers,
                "fsdp": "optim_grads_params" if self.fsdp else "none",
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
        }
        return recipe_from_dict(Recipe, raw)

    @property
    def published(self) -> float:
        """Its tokens per second and GPU."""
        if self.tokens_per_s_per_gpu is not None:
            return self.tokens_per_s_per_gpu
        if self.tflops_per_gpu is not None:
            return self.tflops_per_gpu * 1e12 / model_flops_per_token(self.recipe().model, self.length)
        assert self.step_s is not None, f"{self} has no figure"
        return self.batch * self.length / self.step_s / self.gpus

    def expected(self, machine: Machine) -> float:
        """The simulator's tokens per second and GPU."""
        return estimate(self.recipe(), self.gpus, machine, NEMO).tokens_per_s_per_gpu

    @property
    def layout(self) -> str:
        """Its sizes of parallel groups, in short."""
        sizes = {"tp": self.tp, "pp": self.pp, "vp": self.vp, "cp": self.cp}
        names = [f"{name}{size}{'?' * (name == self.assumed)}" for name, size in sizes.items() if size > 1]
        return " ".join([*names, *["fsdp"] * self.fsdp]) or "dp"


@functools.cache
def _content() -> dict[str, Any]:
    return read_yaml(_FILE)


def sources() -> dict[str, dict[str, str]]:
    """Title, address and date or version of every source, by the name in the rows."""
    found: dict[str, dict[str, str]] = _content()["sources"]
    return found


def rows() -> list[Published]:
    """All published figures."""
    return [Published(**row) for row in _content()["rows"]]


def errors(machine: Machine | None = None) -> dict[Published, float]:
    """The relative error of the expected throughput of every figure."""
    machine = machine or machine_named("h100")
    return {row: row.expected(machine) / row.published - 1 for row in rows()}


def markdown() -> str:
    """The comparison as a table, with the sources below it."""
    header = ["model", "precision", "GPUs", "layout", "batch", "length", "published", "expected", "error", "source"]
    lines = []
    for row, error in errors().items():
        mark = "fitted" if row.fit else "" if abs(error) <= TOLERANCE else "missed"
        expected = row.published * (1 + error)
        numbers = (f"{row.published:,.0f}", f"{expected:,.0f}", f"{error:+.1%} {mark}".strip())
        cells = (row.model, row.precision, f"{row.gpus}", row.layout, f"{row.batch}", f"{row.length}", *numbers)
        lines.append((*cells, row.source))
    names = [f"- {name}: [{source['title']}]({source['url']}), {source['date']}." for name, source in sources().items()]
    return "\n".join([table(header, lines), "", *names])


if __name__ == "__main__":
    print_result(markdown())
