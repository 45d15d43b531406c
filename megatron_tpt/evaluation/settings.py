"""What decides the answers in a folder and their grades: kept beside them, so that others do not mix with them."""

import hashlib
import logging
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_tpt.errors import UserError
from megatron_tpt.evaluation.arms import is_same_model
from megatron_tpt.evaluation.asking import Evaluation
from megatron_tpt.evaluation.benchmark import GRADING, SHOWN, Benchmark
from megatron_tpt.evaluation.provenance import generation_versions, model_identity, tokenizer_identity
from megatron_tpt.files import write_json
from megatron_tpt.jobs.settings import check_settings, describe_changes, read_settings, write_settings

logger = logging.getLogger(__name__)

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


def check(each: Evaluation, settings: dict[str, Any], *, is_running: bool = False) -> None:
    """Raise UserError where the folder has answers to something else, or grades by other rules, or may have them since
    tasks are running."""
    path = each.store.settings_path
    for place in (*reversed(path.parent.parents), path.parent):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: is a file; choose another --output")
    before = read_settings(path)
    if before is not None:
        settings = _comparable(before, settings)
    if not each.options.rescore:
        if before is not None and (is_running or each.store.has_answers()):
            _check_answered(each, before, settings)
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


def _check_answered(each: Evaluation, before: dict[str, Any], settings: dict[str, Any]) -> None:
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed != ["grading"]:
        check_settings(each.store.settings_path, settings)
    elif each.store.samples_path.exists():
        old, new = before["grading"] or {}, settings["grading"]
        names = [name for name in new if new[name] != old.get(name)]
        stored, asked = (" ".join(_as_option(name, values.get(name)) for name in names) for values in (old, new))
        raise UserError(
            f"{each.store.folder}: the stored grades are by {stored}, and now {asked} is asked; give {stored}, or add "
            "--rescore to grade again as now asked"
        )


def _as_option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {option}"
    return option if value is True else f"{option} {shlex.quote(str(value))}"


def note(each: Evaluation, settings: dict[str, Any]) -> None:
    """Keep the settings that `check` has found to fit: in place of others that have left no answers, and with the
    grading of now where nothing is graded."""
    store = each.store
    before = read_settings(store.settings_path)
    if before is None:
        write_settings(store.settings_path, settings)
        return
    own = _comparable(before, settings)
    if own != before and not store.has_answers():
        if any(own[name] != before.get(name) for name in own if name != "grading"):
            logger.info(f"{store.folder}: the earlier settings have no answers; they are replaced")
        store.restart(settings)
    elif own["grading"] != before.get("grading"):
        write_json(store.settings_path, before | {"grading": own["grading"]})


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
