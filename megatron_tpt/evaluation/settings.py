"""What decides the answers in a folder and their grades: kept beside them, so that others do not mix with them."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import is_same_model
from megatron_tpt.evaluation.asking import Evaluation
from megatron_tpt.evaluation.benchmark import GRADING, SHOWN, Benchmark
from megatron_tpt.evaluation.provenance import generation_versions, model_identity, tokenizer_identity
from megatron_tpt.jobs.settings import check_settings, describe_changes, read_settings

_OF_ENGINE = ("versions", "engine", "dtype")


def settings_of(each: Evaluation) -> dict[str, Any]:
    """What decides the answers and the grades: other settings are refused in the same folder."""
    benchmark, arm = each.options.settings(), each.arm
    tokenizer = each.options.tokenizer
    return {
        "model": model_identity(arm.model, is_served=each.options.engine == "endpoint"),
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
        "num_recurrences": arm.recurrences,
        "early_exit": None if arm.early_exit is None else asdict(arm.early_exit),
        "engine": each.options.engine,
        "dtype": each.options.dtype,
        "benchmark": {name: value for name, value in benchmark.items() if name not in GRADING | {"data", "fetch"}},
        "grading": grading_of(each.options),
        "data_sha256": each.problem_set.data_sha256,
        "num_problems": len(each.problems),
        "prompts_sha256": hashlib.sha256("".join(key.prompt_hash for key in each.keys).encode()).hexdigest(),
        "versions": generation_versions(each.options.engine),
    }


def grading_of(benchmark: Benchmark) -> dict[str, Any]:
    """Of the settings of a benchmark, those that decide how outputs are graded."""
    values = benchmark.settings()
    return {name: values[name] for name in sorted(GRADING - SHOWN)}


def check(each: Evaluation, settings: dict[str, Any]) -> None:
    """Raise UserError where the folder has answers to something else."""
    path = each.store.settings_path
    for place in (*reversed(path.parent.parents), path.parent):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: is a file; choose another --output")
    before = read_settings(path)
    if before is not None:
        settings = _comparable(before, settings)
    if not each.options.rescore:
        check_settings(path, settings)
        return
    if before is None:
        raise UserError(f"{each.store.folder}: no outputs to grade again; run without --rescore first")
    # What ran then is no matter now, nor is how it was graded.
    kept = {name: before.get(name) for name in settings if name not in ("grading", *_OF_ENGINE)}
    now = {name: settings[name] for name in kept}
    if differences := list(describe_changes(kept, now)):
        raise UserError(
            f"{each.store.folder}: --rescore grades the outputs that are there, and they were asked for with other "
            f"settings ({'; '.join(differences)}); restore these"
        )


def _comparable(before: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` in the terms of those of before: with the same spelling of a path, and without what earlier versions
    did not record."""
    model = dict(settings["model"])
    name = before["model"].get("name") if isinstance(before.get("model"), dict) else None
    if isinstance(name, str) and is_same_model(name, model["name"]):
        model["name"] = name
    if "tokenizer" in before:
        return settings | {"model": model}
    model.pop("commit", None)
    return {name: value for name, value in settings.items() if name != "tokenizer"} | {"model": model}
