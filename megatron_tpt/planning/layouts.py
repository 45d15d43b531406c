"""All layouts of a recipe on a number of GPUs, and the best of those that fit."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_tpt.config.layout import check_layout
from megatron_tpt.config.load import to_dict
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.planning.machine import Machine
from megatron_tpt.planning.step import Estimate, estimate
from megatron_tpt.training.memory import estimate_memory
from megatron_tpt.units import GIB

# Beyond these, layouts are slower than others wherever they fit.
_MAX_PIPELINE = 64
_MAX_CONTEXT = 32
_MAX_MICRO_BATCH = 8
# From what costs no time to what costs most; for every layout the first with which it fits.
_RECOMPUTATION: tuple[dict[str, Any], ...] = (
    {"recompute": "none"},
    {"recompute": "selective", "recompute_modules": ["mlp"]},
    {"recompute": "full"},
)


@dataclass(frozen=True)
class Plan:
    """A layout with what is expected of it."""

    recipe: Recipe
    """With the layout in place of its own."""
    estimate: Estimate

    @property
    def weights_split(self) -> tuple[int, int, str]:
        """How the weights are spread: tensor and pipeline parallelism, and FSDP."""
        parallel = self.recipe.parallel
        return parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.fsdp

    @property
    def context(self) -> int:
        """Ranks that share a sequence."""
        return self.recipe.parallel.context_parallel_size

    @property
    def order(self) -> tuple[int, int, int]:
        """Smaller for better layouts: by the step time in microseconds; of equal ones, the less the model is spread and
        the smaller its pieces of work are."""
        parallel = self.recipe.parallel
        ranks = parallel.model_parallel_size * parallel.virtual_pipeline_parallel_size
        return round(self.estimate.step_s * 1e6), ranks, self.recipe.training.micro_batch_size


@dataclass(frozen=True)
class Search:
    """What a search has found."""

    ranked: list[Plan]
    """The fastest layout for every way to spread the weights and the context, by its step time; more context
    parallelism only where it is faster."""
    num_considered: int
    refusals: Counter[str]
    """Layouts that the checks of a recipe refuse, by what the message begins with, a field as a rule."""
    num_too_large: int
    """Layouts that need more memory than allowed, whatever they recompute."""
    smallest_bytes: float
    """The least memory that was found to be needed: where none fits, that of the smallest layout."""


def search(recipe: Recipe, num_gpus: int, machine: Machine, memory_bytes: float) -> Search:
    """The layouts of a recipe that need at most `memory_bytes` of a GPU. Raises UserError where there is none."""
    best: dict[tuple[int, int, str, int], Plan] = {}
    refusals = Counter[str]()
    considered = too_large = 0
    smallest = float("inf")
    for candidate in _candidates(recipe, num_gpus):
        considered += 1
        runnable, refusal = _runnable(candidate, num_gpus)
        if not runnable:
            refusals[refusal] += 1
            continue
        fitting = None
        for one in runnable:
            need = _memory(one, num_gpus)
            smallest = min(smallest, need)
            if need <= memory_bytes:
                fitting = one
                break
        if fitting is None:
            too_large += 1
            continue
        plan = Plan(fitting, estimate(fitting, num_gpus, machine))
        key = (*plan.weights_split, plan.context)
        if key not in best or plan.order < best[key].order:
            best[key] = plan
    if not best:
        raise UserError(_nothing_fits(num_gpus, refusals, too_large, smallest, memory_bytes))
    ranked = sorted(best.values(), key=lambda plan: plan.order)
    ranked = [plan for plan in ranked if not _is_spread_in_vain(plan, ranked)]
    return Search(ranked, considered, refusals, too_large, smallest)


def _is_spread_in_vain(plan: Plan, plans: list[Plan]) -> bool:
    """Whether one that spreads the weights alike and shares its sequences among fewer ranks is as fast."""
    alike = (one for one in plans if one.weights_split == plan.weights_split and one.context < plan.context)
    return any(one.order[0] <= plan.order[0] for one in alike)


def own_layout(recipe: Recipe, num_gpus: int, machine: Machine) -> Plan | str:
    """The recipe as it is, or why it does not run on `num_gpus` GPUs."""
    try:
        check_layout(recipe, num_gpus)
    except UserError as error:
        return str(error)
    return Plan(recipe, estimate(recipe, num_gpus, machine))


def overrides(plan: Plan, recipe: Recipe) -> list[str]:
    """What turns the layout of a recipe into that of a plan, as a training program takes it."""
    result = []
    for section in ("parallel", "training"):
        new, old = to_dict(getattr(plan.recipe, section)), to_dict(getattr(recipe, section))
        for name, value in new.items():
            if value != old[name]:
                result.append(f"--{section}.{name}={_yaml(value)}")
    return result


def _yaml(value: Any) -> str:
    """A value on one line of YAML."""
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n...\n").strip()


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _stages(num_layers: int) -> Iterator[tuple[int, int, int | None]]:
    """Stages, pieces of each, and the layers of the first and the last stage where these have one fewer each, in place
    of the embedding and the output matrix."""
    for p in _divisors(num_layers):
        if p <= _MAX_PIPELINE:
            for v in _divisors(num_layers // p) if p > 1 else [1]:
                yield p, v, None
    for p in _divisors(num_layers + 2):
        if 2 < p <= _MAX_PIPELINE and (num_layers + 2) // p > 1:
            yield p, 1, (num_layers + 2) // p - 1


def _candidates(recipe: Recipe, num_gpus: int) -> Iterator[Recipe]:
    """The recipe in every layout whose groups divide the GPUs and the batch."""
    batch = recipe.training.global_batch_size
    for t in _powers(num_gpus):
        if t > recipe.model.query_groups:
            break
        for p, v, ends in _stages(recipe.model.num_layers):
            for c in _powers(_MAX_CONTEXT):
                if num_gpus % (t * p * c):
                    continue
                shards = ("none", "optim_grads_params") if t == p == 1 else ("none",)
                sizes = {
                    "tensor_parallel_size": t,
                    "sequence_parallel": t > 1,
                    "pipeline_parallel_size": p,
                    "virtual_pipeline_parallel_size": v,
                    "context_parallel_size": c,
                    "first_stage_layers": ends,
                    "last_stage_layers": ends,
                }
                for fsdp in shards:
                    for micro_batch in _powers(_MAX_MICRO_BATCH):
                        if batch % (micro_batch * (num_gpus // (t * p * c))) == 0:
                            yield _laid_out(recipe, {**sizes, "fsdp": fsdp}, micro_batch)


def _laid_out(recipe: Recipe, sizes: dict[str, Any], micro_batch: int) -> Recipe:
    exchange = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    fields: dict[str, Any] = sizes | dict.fromkeys(exchange, True)
    return dataclasses.replace(
        recipe,
        parallel=dataclasses.replace(recipe.parallel, **fields),
        training=dataclasses.replace(recipe.training, micro_batch_size=micro_batch),
    )


def _runnable(recipe: Recipe, num_gpus: int) -> tuple[list[Recipe], str]:
    """The layout of a recipe with every kind of recomputation with which it can run, and what the last refusal
    is about."""
    result, refusal = [], ""
    for fields in _RECOMPUTATION:
        try:
            one = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **fields))
            check_layout(one, num_gpus)
        except UserError as error:
            refusal = re.split("[:=]", str(error), maxsplit=1)[0]
            continue
        result.append(one)
    return result, refusal


def _memory(recipe: Recipe, num_gpus: int) -> float:
    stages = estimate_memory(recipe, recipe.parallel.data_parallel_size(num_gpus))
    return max(stage.total for stage in stages)


def _nothing_fits(num_gpus: int, refusals: Counter[str], too_large: int, smallest: float, memory_bytes: float) -> str:
    if not too_large:
        return (
            f"no layout is possible on {num_gpus} GPUs: training.global_batch_size, model.num_layers and the number of "
            f"GPUs have too few common divisors{refused_by(refusals, '; refused by the checks of ')}"
        )
    return (
        f"none of {too_large:,} layouts on {num_gpus} GPUs fits: the smallest needs {smallest / GIB:.1f} GiB of a GPU, "
        f"and --memory-share allows {memory_bytes / GIB:.1f}: give more GPUs, or a GPU with more memory"
    )


def refused_by(refusals: Counter[str], before: str) -> str:
    """The fields whose checks refused layouts, each with how many; empty without any."""
    named = ", ".join(f"{name} ({number:,})" for name, number in refusals.most_common())
    return f"{before}{named}" if named else ""
