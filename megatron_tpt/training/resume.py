"""Decides whether a run may resume from a checkpoint with this recipe: which changes are refused or reported.

config/changes.py defines what a change of each field does. The trainer checks this when it resumes; `--dry-run` checks
the same before anything is started.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_tpt.config.changes import Change, changes
from megatron_tpt.config.effects import is_default
from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.on_change import Effect
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError
from megatron_tpt.indexing.manifest import TokenizerInfo
from megatron_tpt.training.checkpoint_files import checkpoints_to_read, damage_of_files

# Checkpoints of earlier versions lack it.
TEXT = "text of data.train"

DataIdentity = Callable[[int], dict[str, str]]
"""TrainingData.identity."""


def resume_warnings(
    recipe: Recipe, folder: Path, state: dict[str, Any], data_identity: DataIdentity | None
) -> Iterator[str]:
    """Warnings when a run resumes from a checkpoint with this recipe, one line each; consume all of them before loading
    anything.

    `state` is the trainer's state in the checkpoint; `data_identity` is None if the data is not on this machine. Raises
    UserError for changes that are refused.
    """
    saved, step = read_yaml(folder / "recipe.yaml"), int(state["step"])
    if step > recipe.training.num_steps:
        raise UserError(
            f"{folder} is beyond training.num_steps={recipe.training.num_steps}: raise it, or start in another "
            f"run.output_dir"
        )
    differences = list(changes(recipe, saved))
    _require_permitted(differences, recipe, folder, saved)
    if taking := [change for change in differences if change.on_resume in (Effect.WARNED, Effect.PRECISION)]:
        yield f"other settings than those of {folder} take effect after step {step}: {', '.join(map(str, taking))}"
    for change in differences:
        if change.on_resume is Effect.NONE and not is_default(getattr(recipe, change.section), change.field):
            yield f"{change} has no effect: the weights are those of {folder}"
    yield from _consumption_warnings(recipe, folder, step, differences)
    if data_identity is not None:
        yield from _data_warnings(recipe, folder, state, data_identity(recipe.training.num_samples(step)))
    yield from _rate_warnings(recipe, folder, state)


def _require_permitted(differences: list[Change], recipe: Recipe, folder: Path, saved: dict[str, Any]) -> None:
    """Raise UserError for changes that may not be made on resume."""
    fixed = {Effect.REFUSED} | (set() if recipe.parallel.distributed_optimizer else {Effect.PRECISION})
    _refuse(folder, [change for change in differences if change.on_resume in fixed])
    if (saved.get("checkpoint") or {}).get("optimizer_sharding") == "dp_reshardable":
        of_layout = [change for change in differences if change.on_resume is Effect.LAYOUT]
        _refuse(folder, of_layout, others=("checkpoint.optimizer_sharding=dp_reshardable",))
    if not recipe.data.allow_change:
        advice = ", or give --data.allow_change=true to continue at the samples consumed"
        _refuse(folder, [change for change in differences if change.on_resume is Effect.ALLOWED], advice=advice)


def _refuse(folder: Path, refused: list[Change], *, others: tuple[str, ...] = (), advice: str = "") -> None:
    """Raise UserError with the values that the checkpoint was written with, if there is a change to refuse."""
    if not refused:
        return
    fits = "" if any(change.section == "model" for change in refused) else " (training.init_from takes the weights)"
    raise UserError(
        f"{folder} was written with {', '.join([*others, *(change.before for change in refused)])}: resume with "
        f"{'that' if len(refused) == 1 else 'those'}{advice}, or start in another run.output_dir{fits}"
    )


def _consumption_warnings(recipe: Recipe, folder: Path, step: int, differences: list[Change]) -> Iterator[str]:
    """Warn where in the data a run with a new batch size or sequence length continues."""
    training = recipe.training
    if training.num_steps_done > step:
        raise UserError(
            f"{folder} is of step {step}, and training.batch_size_ramp says that {training.num_steps_done} steps are "
            f"done: start the same command again where a newer checkpoint was set aside, else correct it"
        )
    changed = {change.field for change in differences if change.on_resume is Effect.ALLOWED}
    if not changed:
        return
    yield (
        f"other batches than {folder} had (data.allow_change): after step {step}, {training.batch_size(step)} samples "
        f"of {training.sequence_length} tokens a step, from sample {training.num_samples(step)} on"
    )
    if "sequence_length" in changed:
        yield (
            "samples of another training.sequence_length come in another order: some text is repeated before all of it "
            "has been read"
        )


def _data_warnings(recipe: Recipe, folder: Path, state: dict[str, Any], here: dict[str, str]) -> Iterator[str]:
    """Warn of changed training data. Raises UserError if the recipe does not allow changes."""
    there = state["data"]
    changed = [name for name, value in here.items() if there.get(name, value if name == TEXT else None) != value]
    if not changed:
        return
    if not recipe.data.allow_change:
        raise UserError(
            f"{folder} was written by a run with another {', '.join(changed)}: its data order cannot continue with "
            f"this recipe. Restore it, or start in another run.output_dir (training.init_from takes the weights); "
            f"--data.allow_change=true resumes anyway"
        )
    yield (
        f"training data, shares or numbers of samples differ from those of {folder} (data.allow_change): sources that "
        f"are read more than once may come in another order, so that some documents are read more often than others"
    )


def _rate_warnings(recipe: Recipe, folder: Path, state: dict[str, Any]) -> Iterator[str]:
    """Warn if the learning rate jumps, even if only training.num_steps differs."""
    from megatron_tpt.training.optimizer import build_schedule

    group = {"max_lr": recipe.optimizer.learning_rate, "min_lr": recipe.optimizer.min_learning_rate}
    schedule = build_schedule(SimpleNamespace(param_groups=[group]), recipe)
    schedule.step(state["step"])
    before, now = state.get("learning_rate"), group["lr"]
    if before is not None and not math.isclose(before, now):
        yield (
            f"the learning rate continues at {now:.4g}, and {folder} would have continued at {before:.4g}: the "
            f"schedule is that of this recipe (section optimizer; training.num_steps, where decay_steps is not given)"
        )


def start_warnings(recipe: Recipe, folder: Path) -> Iterator[str]:
    """Warnings when a run starts from the weights of a checkpoint. Raises UserError if its model has another shape."""
    differences = [change for change in changes(recipe, read_yaml(folder / "recipe.yaml")) if change.section == "model"]
    for change in differences:
        if change.from_weights is Effect.REFUSED:
            raise UserError(
                f"training.init_from={folder} has a model of {change.before}, and this recipe {change}: omit the field"
            )
    if taking := [change for change in differences if change.from_weights is Effect.WARNED]:
        yield f"the model computes with other settings than {folder} was trained with: {', '.join(map(str, taking))}"
    for change in differences:
        if change.from_weights is Effect.NONE:
            yield f"{change} has no effect: the weights are those of {folder}"


def _damage(folder: Path) -> str:
    """Missing files of a checkpoint and files of the wrong size, in one line; empty if there are none."""
    return "; ".join(damage_of_files(folder)[:4])


def describe_start(
    recipe: Recipe, tokenizer: TokenizerInfo | None, data_identity: DataIdentity | None
) -> Iterator[str]:
    """Where a run would start and what it would report, one line each; nothing is loaded.

    Raises UserError for what the run would refuse. `data_identity` is TrainingData.identity, None if the data is not on
    this machine.
    """
    checkpoints = recipe.run.output_dir / "checkpoints"
    folders = checkpoints_to_read(checkpoints)[::-1]
    init_from = recipe.training.init_from
    if not folders and init_from is None and recipe.needs_start:
        yield "warning: training.init_from is empty: a run needs the checkpoint to start from"
    elif not folders and init_from is None:
        yield f"starts from random weights in {recipe.run.output_dir}"
    elif not folders:
        assert init_from is not None
        if damage := _damage(init_from):
            raise UserError(f"training.init_from={init_from} is damaged ({damage}): give another checkpoint")
        yield from (f"warning: {warning}" for warning in start_warnings(recipe, init_from))
        yield f"starts in {recipe.run.output_dir} from the weights of {init_from}"
    for folder in folders:
        if not (damage := _damage(folder)):
            yield from _describe_resumption(recipe, folder, tokenizer, data_identity)
            return
        yield f"warning: {folder} is damaged ({damage}): it would be moved aside"
    if folders:
        raise UserError(f"no checkpoint in {checkpoints} is whole: restore the missing files, or delete them")


def _describe_resumption(
    recipe: Recipe,
    folder: Path,
    tokenizer: TokenizerInfo | None,
    data_identity: DataIdentity | None,
) -> Iterator[str]:
    from megatron_tpt.training.checkpoint_loading import read_trainer_state

    require_tokenizer(folder, tokenizer.fingerprint if tokenizer is not None else None)
    state = read_trainer_state(folder)
    yield from (f"warning: {warning}" for warning in resume_warnings(recipe, folder, state, data_identity))
    left = recipe.training.num_steps - state["step"]
    yield f"resumes from {folder}: {left} of {recipe.training.num_steps} steps are left" + (
        "" if left else "; nothing is left to do: raise training.num_steps to train further"
    )


def require_tokenizer(folder: Path, fingerprint: str | None) -> None:
    """Raise UserError when a checkpoint has another tokenizer than the one of this fingerprint, if it is known."""
    from megatron_tpt.indexing.tokenizer import is_of_other_tokenizer

    if fingerprint and is_of_other_tokenizer(folder, fingerprint):
        raise UserError(
            f"{folder} was written by a run with another tokenizer: give data of that tokenizer, or start in another "
            f"run.output_dir"
        )
