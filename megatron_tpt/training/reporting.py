"""Metrics over the steps between two reports, for the console and the metrics writer (metrics_writer.py)."""

import collections
import functools
import itertools
import logging
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron_tpt import platform
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.training import metrics
from megatron_tpt.training.blend import MAX_NAMES
from megatron_tpt.training.metrics_writer import MetricsWriter
from megatron_tpt.training.stragglers import Stragglers
from megatron_tpt.training.trainer import Callback, StepReport, Trainer
from megatron_tpt.units import GIB, duration

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

logger = logging.getLogger(__name__)


def parameter_norm(chunks: Sequence[torch.nn.Module]) -> float:
    """Euclidean norm of all weights of a model; `chunks` are this rank's part. All ranks call it.

    A weight on several ranks is counted once: norms and biases on the first tensor-parallel rank, a tied output matrix
    on the first pipeline stage.
    """
    total = torch.zeros((), dtype=torch.float64, device=platform.device())
    group = parallel_state.get_model_parallel_group()
    for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
        if isinstance(parameter, DTensor):  # Megatron FSDP's
            parameter, group = parameter.to_local(), parallel_state.get_data_parallel_group(with_context_parallel=True)
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
            total += torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32).double() ** 2
    torch.distributed.all_reduce(total, group=group)
    return float(total.sqrt())


def _measure_memory_gib() -> dict[str, float]:
    """Peak memory in GiB: of the GPU since the last call, of the process since its start."""
    host = {"memory_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if not torch.cuda.is_available():
        return host
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return {"memory_allocated_gib": allocated / GIB, "memory_reserved_gib": reserved / GIB, **host}


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _measure_power() -> dict[str, float]:
    """Power draw of the first rank's GPU in watts; empty, with one warning, if the driver's library does not report
    it."""
    if not torch.cuda.is_available() or not platform.is_first_rank():
        return {}
    try:
        return {"gpu_power_w": torch.cuda.power_draw() / 1000}
    except Exception as error:  # NVML's errors have no narrower base class: no sensor, no permission, no library
        _warn_once(f"gpu_power_w is omitted from the metrics: {error}")
        return {}


class Window:
    """Measurements of this rank since the last report."""

    def __init__(self, num_sums: int) -> None:
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=platform.device())  # of the objective
        self.step_seconds: list[float] = []
        self.data_wait_s = 0.0
        self.own_work_s: list[float] = []  # local work of the steps that this process did and did not skip
        self.num_tokens = 0
        self.earlier_s = 0.0
        self.began = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Count a step."""
        self.sums += report.sums
        self.step_seconds.append(report.seconds)
        self.data_wait_s += report.data_wait_s
        if report.num_tokens:
            self.own_work_s.append(report.own_work_s)
        self.num_tokens += report.num_tokens

    @property
    def elapsed_s(self) -> float:
        """Wall time since the window was opened, including that of earlier processes of the run."""
        return self.earlier_s + time.perf_counter() - self.began

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """The window for a checkpoint: sums over all ranks, times of the slowest rank. All ranks call it."""
        times = _maxima([*self.step_seconds, self.data_wait_s, self.elapsed_s])
        return {
            "sums": trainer.named_sums(self.sums.clone()),
            "step_seconds": times[:-2],
            "data_wait_s": times[-2],
            "elapsed_s": times[-1],
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], names: Sequence[str]) -> "Window":
        """The open window in a checkpoint, with sums of these names; those that it lacks start at 0, for example after
        a source was added. Only one data-parallel rank takes the sums, since they are summed over ranks again."""
        window = cls(len(names))
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
            sums = state["sums"] if "sums" in state else _sums_by_name(state["loss_sums"])
            values = [sums.get(name, 0.0) for name in names]
            window.sums += torch.tensor(values, dtype=torch.float64, device=platform.device())
        window.step_seconds, window.data_wait_s = list(state["step_seconds"]), state["data_wait_s"]
        window.num_tokens, window.earlier_s = state["num_tokens"], state["elapsed_s"]
        return window


def _sums_by_name(by_source: dict[str, list[float]]) -> dict[str, float]:
    """Named sums from a checkpoint of an earlier version, which had the document loss and tokens and the thinking loss
    and tokens of every source."""
    sums: collections.Counter[str] = collections.Counter()
    for source, (document_loss, document_tokens, thinking_loss, thinking_tokens) in by_source.items():
        loss, tokens = document_loss + thinking_loss, document_tokens + thinking_tokens
        sums.update({"loss": loss, "tokens": tokens, f"source_loss/{source}": loss, f"source_tokens/{source}": tokens})
        sums.update({"thinking_loss": thinking_loss, "thinking_tokens": thinking_tokens})
    return dict(sums)


def _maxima(values: list[float]) -> list[float]:
    """The largest of every value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=platform.device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


class ReportMetrics(Callback):
    """Every logging.log_interval steps: losses by kind and source, norms, speed, memory, the time that remains."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self.restored: dict[str, Any] | None = None

    def before_training(self, trainer: Trainer) -> None:
        recipe = trainer.recipe
        self.trainer = trainer
        self.writer = trainer.metrics = MetricsWriter(recipe, trainer.global_step)
        names = trainer.objective.sum_names
        self.window = Window(len(names)) if self.restored is None else Window.from_state(self.restored, names)
        self.peak_tflops = self._peak_tflops(recipe)
        self.stragglers = Stragglers()

    def _flops_per_token(self, recipe: Recipe, measured: dict[str, float]) -> float:
        passes = recipe.model.passes(measured)
        return model_flops_per_token(recipe.model, recipe.training.sequence_length, passes)

    def _peak_tflops(self, recipe: Recipe) -> float | None:
        """The peak that MFU is relative to: the recipe's, or that of the device. Prints which one it is."""
        precision = recipe.training.matmul_precision
        device_name = "this device"
        peak = recipe.logging.peak_tflops
        if peak is None and torch.cuda.is_available():
            device_name = torch.cuda.get_device_name()
            peak = metrics.device_peak_tflops(device_name, precision)
        if peak is not None:
            logger.info(
                f"MFU = tokens/s x {self._flops_per_token(recipe, {}):.4g} FLOPs per token"
                f"{' at the mean depth' if recipe.model.depth_limits else ''} / {torch.distributed.get_world_size()} "
                f"devices / {peak:g} TFLOP/s (dense {precision} peak of {device_name})"
            )
        return peak

    def state(self) -> dict[str, Any]:
        assert self.window is not None
        self.writer.sync()
        return self.window.state(self.trainer)

    def load_state(self, state: dict[str, Any]) -> None:
        self.restored = state

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        assert self.window is not None
        self.window.add(report)
        if (
            trainer.global_step % trainer.recipe.logging.log_interval == 0
            or trainer.global_step == trainer.recipe.training.num_steps
        ):
            values = self._measure(trainer, report, self.window)
            slowdowns = self.stragglers.compare(statistics.mean(self.window.own_work_s or [0.0]))
            slowest = max(slowdowns, key=lambda one: one.ratio)
            values |= {"slowest_rank": slowest.rank, "slowest_rank_ratio": slowest.ratio}
            trainer.metrics.write(trainer.global_step, values)
            num_steps = trainer.recipe.training.num_steps
            logger.info(f"step {trainer.global_step:>7}/{num_steps}  {console_line(values)}")
            self.stragglers.warn(slowdowns, trainer.recipe.logging.straggler_factor)
            self.window = Window(len(trainer.objective.sum_names))

    def _measure(self, trainer: Trainer, report: StepReport, window: Window) -> dict[str, float]:
        elapsed_s, num_steps = window.elapsed_s, len(window.step_seconds)
        sums = trainer.named_sums(window.sums)
        memory = _measure_memory_gib()
        slowest = _maxima([*memory.values(), *window.step_seconds, window.data_wait_s])
        memory = dict(zip(memory, slowest, strict=False))
        seconds, data_wait_s = slowest[len(memory) : -1], slowest[-1]
        values = trainer.objective.metrics(sums)
        values["tokens"] = trainer.tokens
        values |= {"learning_rate": report.learning_rate, "grad_norm": report.grad_norm}
        trainer.model.gather_weights()
        values |= {"param_norm": parameter_norm(trainer.model.chunks)}
        values |= metrics.step_times(seconds)
        values |= metrics.throughput(
            window.num_tokens,
            sum(seconds),
            data_wait_s,
            flops_per_token=self._flops_per_token(trainer.recipe, values),
            num_devices=torch.distributed.get_world_size(),
            peak_tflops=self.peak_tflops,
        )
        steps_left = trainer.recipe.training.num_steps - trainer.global_step
        values |= {"remaining_s": metrics.remaining_s(steps_left, elapsed_s, num_steps), **memory, **_measure_power()}
        if trainer.data.source_tokens is not None:
            tokens = trainer.data.source_tokens.after(trainer.recipe.training.num_samples(trainer.global_step))
            if len(tokens) <= MAX_NAMES:
                epochs = trainer.data.source_tokens.epochs(tokens)
                values |= {f"source_tokens/{name}": value for name, value in tokens.items()}
                values |= {f"source_epochs/{name}": value for name, value in epochs.items()}
        return values

    def after_training(self, trainer: Trainer) -> None:
        trainer.metrics.close()


def console_line(values: dict[str, float]) -> str:
    """The most useful metrics, on one line."""
    parts = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith("loss")]
    parts = parts or ["no loss"]  # the steps had no tokens to learn from, or were skipped
    parts += [f"lr {values['learning_rate']:.3e}", f"grad norm {values['grad_norm']:.3f}"]
    parts += [f"{values['tokens_per_s']:,.0f} tokens/s", f"{values['tflops_per_device']:.3g} TFLOP/s/device"]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"data wait {values['data_wait_fraction']:.1%}")
    if "memory_reserved_gib" in values:
        parts.append(f"{values['memory_reserved_gib']:.1f} GiB")
    return "  ".join([*parts, f"{duration(values['remaining_s'])} left"])
