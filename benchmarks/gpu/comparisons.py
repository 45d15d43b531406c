"""What the steps compare: kernels, models by their gradients, packed examples, memory, and the cost of options."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import training as bench
from benchmarks.gpu.kernels import all_kernels, compare, relative_error, too_far
from megatron_tpt import platform
from megatron_tpt.objectives.objective import MicroBatch
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.training.batches import Batch
from megatron_tpt.training.checkpoint_state import members, weights_of
from megatron_tpt.training.memory import estimate_memory
from megatron_tpt.training.model import TrainedModel

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_model import GPTModel

KERNELS = ("rope", "rope of packed examples", "swiglu", "cross entropy", "masked softmax", "attention")
MODEL_TOLERANCE = 0.05
"""Relative difference of a bf16 model's gradients under two sets of kernels: each rounds in every layer."""
MakeTrainer = Callable[..., AbstractContextManager[Any]]


def compare_kernel(name: str, recipe: PretrainRecipe) -> dict[str, Any]:
    """Relative errors of one kernel in bf16, as a model of `recipe` runs it here. Raises ArithmeticError where they are
    larger than rounding explains."""
    with platform.process_groups(recipe.parallel):
        platform.seed_everything(1)
        kernel = all_kernels(recipe, platform.device(), recipe.training.sequence_length)[name]
        errors = compare(kernel, torch.bfloat16)
    if wrong := too_far(errors, torch.bfloat16):
        raise ArithmeticError(f"{name}: {wrong} are further from plain torch than bf16 explains: {errors}")
    return errors


def gradients(gpt: GPTModel) -> dict[str, Tensor]:
    """Of every weight, by its key in checkpoints and its place there: the same names whatever the kernels."""
    state = weights_of(gpt)
    for name, parameter in gpt.named_parameters():
        state[name].data = parameter.main_grad
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor) and part.data is not None]
    return {f"{part.key} {part.global_offset}": part.data.float().cpu() for part in parts}


def _loss_and_gradients(trainer: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss, tokens = trainer.model.forward_backward(batch, trainer.objective)[:2].tolist()
    return loss / tokens, gradients(trainer.model.gpts[0])


def largest_errors(found: dict[str, Tensor], expected: dict[str, Tensor], num: int = 3) -> dict[str, float]:
    """The `num` tensors that differ most, with their relative errors."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    return dict(sorted(errors.items(), key=lambda item: -item[1])[:num])


def compare_models(make_trainer: MakeTrainer, model: dict, training: dict) -> dict[str, Any]:
    """Loss and gradients of one batch through this machine's kernels and through Megatron Core's own, from the same
    weights. Raises ArithmeticError where they are further apart than rounding explains."""
    results = {}
    for implementation in ("auto", "local"):
        with make_trainer(model | {"transformer_impl": implementation}, training) as trainer:
            results[implementation] = _loss_and_gradients(trainer, next(trainer.batches()))
            del trainer
    (loss, found), (expected_loss, expected) = results["auto"], results["local"]
    errors = largest_errors(found, expected)
    figures = {"loss": loss, "loss of Megatron Core's own kernels": expected_loss, "largest gradient errors": errors}
    if not (max(errors.values()) <= MODEL_TOLERANCE and abs(loss - expected_loss) <= 0.01 * abs(expected_loss)):
        raise ArithmeticError(f"further apart than bf16 explains: {figures}")
    return figures


def packed(batch: MicroBatch) -> MicroBatch:
    """The rows of a micro-batch as three examples of different lengths each."""
    length = batch["tokens"].shape[1]
    begins = torch.zeros_like(batch["tokens"])
    begins[:, [0, length // 2, length - length // 6]] = 1
    segments = begins.cumsum(dim=1)
    positions = torch.arange(length).expand_as(segments)
    starts = torch.where(begins.bool(), positions, 0).cummax(dim=1).values
    return batch | {"segment_ids": segments, "position_ids": positions - starts}


def _examples(batch: MicroBatch) -> Iterator[MicroBatch]:
    """Each example of a packed micro-batch in a row of its own."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in segments.unique():
            place = segments == segment
            own = {name: value[row : row + 1, place] for name, value in batch.items() if value.dim() == 2}
            yield {name: value for name, value in own.items() if name != "segment_ids"}


def compare_packed(make_trainer: MakeTrainer, model: dict, length: int) -> dict[str, Any]:
    """Packed examples as this machine computes them, against a mask over the row in Megatron Core's own attention, and
    against each example alone in it. Raises ArithmeticError where they are further apart than rounding explains."""
    training = {"sequence_length": length, "micro_batch_size": 2, "global_batch_size": 2}
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    alone = torch.empty(0)
    for implementation in ("auto", "local"):
        with make_trainer(model | {"transformer_impl": implementation}, training) as trainer:
            (rows,) = list(next(trainer.batches()))
            rows.pop("seed")
            batch = Batch([packed(rows)], [0], rows["tokens"].numel())
            likelihoods = trainer.model.log_probabilities(batch).float().cpu()
            found[implementation] = likelihoods, _loss_and_gradients(trainer, batch)[1]
            if implementation == "local":
                each = [Batch([example], [0], example["tokens"].numel()) for example in _examples(packed(rows))]
                parts = [trainer.model.log_probabilities(one).float().cpu().flatten() for one in each]
                alone = torch.cat(parts).view_as(likelihoods)
            del trainer
    (likelihoods, own), (masked, expected) = found["auto"], found["local"]
    figures = {
        "likelihoods against the mask": relative_error(likelihoods, masked),
        "likelihoods against each alone": relative_error(likelihoods, alone),
        "gradients against the mask": max(largest_errors(own, expected).values()),
    }
    if not max(figures.values()) <= MODEL_TOLERANCE:
        raise ArithmeticError(f"further apart than bf16 explains: {figures}")
    return figures


def _bytes_held(model: TrainedModel) -> int:
    """Weights, gradients, and the optimizer's main weights and moments."""
    parameters = [parameter for gpt in model.gpts for parameter in gpt.parameters()]
    tensors = [*parameters, *(parameter.main_grad for parameter in parameters)]
    for member in members(model.optimizer):
        for group in member.optimizer.param_groups:
            for main in group["params"]:
                tensors += [main, *(value for name, value in member.optimizer.state[main].items() if name != "step")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_memory(make_trainer: MakeTrainer, model: dict, training: dict) -> dict[str, Any]:
    """GiB that training takes at its peak and between steps, and what is computed of it. A CPU has no such peak: there
    the tensors are counted."""
    on_gpu, gib = torch.cuda.is_available(), 2**30
    with make_trainer(model, training) as trainer:
        recipe, steps = trainer.recipe, bench.steps_of(trainer, 3)
        for _ in range(2):
            next(steps)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        next(steps)
        held = _bytes_held(trainer.model) / gib
        allocated = torch.cuda.memory_allocated() / gib if on_gpu else None
        peak = torch.cuda.max_memory_allocated() / gib if on_gpu else None
        steps.close()  # type: ignore[attr-defined]
        del trainer, steps
    (computed,) = estimate_memory(recipe, 1)
    return {
        "tensors_gib": held,
        "tensors_computed_gib": (computed.total - computed.activations) / gib,
        "allocated_between_steps_gib": allocated,
        "peak_gib": peak,
        "peak_computed_gib": computed.total / gib,
        "peak_over_computed": None if peak is None else peak * gib / computed.total,
    }


def time_steps(make_trainer: MakeTrainer, model: dict, training: dict, num_steps: int) -> dict[str, Any]:
    """Losses, the median step's tokens/s, and the peak of the memory."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with make_trainer(model, training) as trainer:
        done = list(bench.steps_of(trainer, num_steps))
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        del trainer
    seconds = statistics.median(step_s for _, step_s in done[1:])
    rate = training["sequence_length"] / seconds
    return {"losses": [loss for loss, _ in done], "tokens_per_s": rate, "peak_gib": peak}


def time_checkpoint(make_trainer: MakeTrainer, model: dict, training: dict, num_steps: int) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint written in the background, its steps meanwhile and without,
    and until it is whole."""
    with make_trainer(model, training) as trainer:
        trainer.checkpoints = Path(tempfile.mkdtemp()) / "checkpoints"
        batches = bench.steps_of(trainer, 2 * num_steps + 1)
        next(batches)
        before = [seconds for _, seconds in itertools.islice(batches, num_steps)]
        begin = time.perf_counter()
        saving = trainer.start_saving()
        saving.write_in_background()
        stands_still = time.perf_counter() - begin
        meanwhile = [seconds for _, seconds in itertools.islice(batches, num_steps)]
        saving.finish()
        whole = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in saving.folder.rglob("*") if path.is_file())
        del trainer, batches, saving
    return {
        "stands_still_s": stands_still,
        "whole_after_s": whole,
        "checkpoint_gib": size / 2**30,
        "step_s": statistics.median(before),
        "step_s_meanwhile": statistics.median(meanwhile),
    }
