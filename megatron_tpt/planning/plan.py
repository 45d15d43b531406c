"""The work of tools/plan.py: search the layouts of a recipe, and print the best."""

import json
from dataclasses import asdict
from typing import Any

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.logs import print_result
from megatron_tpt.planning.layouts import Plan, Search, overrides, own_layout, refused_by, search
from megatron_tpt.planning.machine import Machine, machine_named
from megatron_tpt.planning.options import PlanOptions
from megatron_tpt.training.blend import format_table
from megatron_tpt.units import GIB, duration


def plan(recipe: Recipe, options: PlanOptions) -> None:
    """Print the best layouts of a recipe. Raises UserError where none fits, or the GPU lacks the precision."""
    machine = machine_named(options.gpu, options.gpus_per_node, options.network_gbit_per_s)
    found = search(recipe, options.gpus, machine, options.memory_share * machine.memory_bytes)
    own = own_layout(recipe, options.gpus, machine)
    if options.json:
        print_result(json.dumps(_as_json(recipe, options, machine, found, own), indent=2))
        return
    print_result("\n\n".join(_sections(recipe, options, machine, found, own)))


def _sections(recipe: Recipe, options: PlanOptions, machine: Machine, found: Search, own: Plan | str) -> list[str]:
    best, training = found.ranked[0], recipe.training
    tokens = training.global_batch_size * training.sequence_length
    ranks = [(str(rank), one) for rank, one in enumerate(found.ranked[: options.top], start=1)]
    nodes = -(-options.gpus // options.gpus_per_node)
    num_tokens = training.num_samples(training.num_steps) * training.sequence_length
    return [
        f"{recipe.model.num_parameters():,} parameters, {tokens:,} tokens per step, {training.matmul_precision}, "
        f"{options.gpus} x {machine.name} in {nodes} nodes",
        _counts(options, machine, found),
        _table([*ranks, *([("own", own)] if isinstance(own, Plan) else [])], options.gpus),
        *([] if isinstance(own, Plan) else [f"the recipe's own layout does not run on {options.gpus} GPUs: {own}"]),
        *(["Muon's iterations are not in these times"] if recipe.optimizer.name == "muon" else []),
        f"what a rank of the best sends in a step:\n{_traffic_table(best)}",
        f"the run with it: {duration(num_tokens / best.estimate.tokens_per_s)} for {num_tokens:,} tokens, "
        f"{recipe.uncounted} apart",
        "the best as options of the training program:\n" + " ".join(overrides(best, recipe) or ["none: it is the own"]),
    ]


def _counts(options: PlanOptions, machine: Machine, found: Search) -> str:
    """How many layouts are not listed, and why."""
    refused = found.refusals.total()
    limit, whole = options.memory_share * machine.memory_bytes / GIB, machine.memory_bytes / GIB
    return (
        f"{found.num_considered:,} layouts: {refused:,} dropped{refused_by(found.refusals, ' by the checks of ')}; "
        f"{found.num_too_large:,} dropped because they need more than {limit:.1f} of {whole:.1f} GiB. Of the other "
        f"{found.num_considered - refused - found.num_too_large:,} the fastest of every TP x PP x CP is ranked, with "
        f"more CP only where that is faster: {len(found.ranked)}"
    )


def _table(plans: list[tuple[str, Plan]], num_gpus: int) -> str:
    header = ("", "TP", "PP", "VP", "CP", "DP", "micro", "recompute", "GiB", "bubble", "waits", "step s")
    rows = [(*header, "tokens/s", "per GPU", "MFU")]
    for rank, one in plans:
        parallel, training, expected = one.recipe.parallel, one.recipe.training, one.estimate
        dp = parallel.data_parallel_size(num_gpus)
        pieces = str(parallel.virtual_pipeline_parallel_size) + ("" if parallel.first_stage_layers is None else "*")
        rows.append(
            (
                rank,
                str(parallel.tensor_parallel_size),
                str(parallel.pipeline_parallel_size),
                pieces,
                str(parallel.context_parallel_size),
                f"{dp}" if parallel.fsdp == "none" else f"{dp} FSDP",
                str(training.micro_batch_size),
                training.recompute,
                f"{expected.memory.total / GIB:.1f}",
                f"{expected.bubble_s / expected.step_s:.1%}",
                f"{sum(expected.waits_s.values()) / expected.step_s:.1%}",
                f"{expected.step_s:.3f}",
                f"{expected.tokens_per_s:,.0f}",
                f"{expected.tokens_per_s_per_gpu:,.0f}",
                f"{expected.mfu:.1%}",
            )
        )
    notes = ["* the first and the last stage have a layer less"] if any("*" in row[3] for row in rows) else []
    return "\n".join([format_table(rows), *notes])


def _traffic_table(best: Plan) -> str:
    rows = [("kind", "ranks", "GB", "messages", "link", "seconds", "waited")]
    for kind, sent in best.estimate.traffic.items():
        waited = best.estimate.waits_s[kind]
        size = (f"{sent.num_bytes / 1e9:.2f}", f"{sent.num_messages:,.0f}")
        rows.append((kind, str(sent.num_ranks), *size, sent.link, f"{sent.seconds:.3f}", f"{waited:.3f}"))
    return format_table(rows) if len(rows) > 1 else "nothing"


def _as_json(recipe: Recipe, options: PlanOptions, machine: Machine, found: Search, own: Plan | str) -> dict[str, Any]:
    """All numbers, in seconds and bytes, and what the machine was taken to be."""
    return {
        "gpus": options.gpus,
        "machine": asdict(machine),
        "considered": found.num_considered,
        "refused": dict(found.refusals),
        "too_large": found.num_too_large,
        "layouts": [_plan_as_json(one, recipe) for one in found.ranked[: options.top]],
        "own_layout": _plan_as_json(own, recipe) if isinstance(own, Plan) else None,
    }


def _plan_as_json(one: Plan, recipe: Recipe) -> dict[str, Any]:
    expected = one.estimate
    memory = asdict(expected.memory) | {"total": expected.memory.total}
    derived = {"step_s": expected.step_s, "bubble_fraction": expected.bubble_fraction, "memory": memory}
    return {"options": overrides(one, recipe)} | asdict(expected) | derived
