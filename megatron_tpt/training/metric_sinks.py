"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, and a file for Prometheus.

Each is a Sink, made by `open_sinks` from section `logging` of a recipe, on the first rank alone.
"""

import abc
import contextlib
import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_tpt.config.load import to_dict, to_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.errors import UserError, one_line
from megatron_tpt.files import real_path

logger = logging.getLogger(__name__)

_LOSS_OF = "loss_(document|thinking|answer)$"
CHARTS = {
    "Losses": {
        "training and validation": ["loss$", "validation_loss$"],
        "document, thinking, answer": [_LOSS_OF, f"validation_{_LOSS_OF}"],
        "by source": ["source_loss/"],
        "by validation set": ["validation_loss/"],
    },
    "Depth": {
        "loss by iterations": ["depth_loss/"],
        "iterations": ["depth$", "depth_mean$", "depth_backprop$"],
        "states": ["state_norm$", "state_change$"],
    },
    "Reinforcement learning": {
        "reward": ["reward$", "reward/"],
        "accuracy": ["accuracy$"],
        "tokens of a response": ["response_tokens$"],
        "mismatch of engine and trainer": ["mismatch/gap$", "mismatch/kl_k3$"],
        "divergence from the reference, entropy": ["reference_kl$", "rollout_entropy$"],
        "loss on the answer along the thinking": ["repro/L_"],
        "process advantage of right and wrong": ["repro/advantage_(right|wrong)$"],
        "critic": ["critic/loss$", "critic/explained_variance$"],
    },
    "Throughput": {
        "tokens/s": ["tokens_per_s$"],
        "tokens/s per device": ["tokens_per_s_per_device$"],
        "MFU": ["mfu$"],
        "TFLOP/s per device": ["tflops_per_device$"],
        "seconds per step": ["step_p50_s$", "step_max_s$"],
        "share of the time that waits for data": ["data_wait_fraction$"],
    },
    "Health": {
        "gradient norm": ["grad_norm$"],
        "weight norm": ["param_norm$"],
        "learning rate": ["learning_rate$"],
        "slowest rank, times the median": ["slowest_rank_ratio$"],
        "memory, GiB": ["memory_.*_gib$"],
        "power of the first GPU, W": ["gpu_power_w$"],
    },
    "Data": {"epochs": ["source_epochs/"], "tokens": ["source_tokens/"]},
}
"""The charts of TensorBoard (Custom Scalars) and of tools/report.py by category, each with regular expressions that
match the beginning of its metrics' names."""


def metrics_of_chart(tags: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of these metrics that belong to a chart of CHARTS with these expressions."""
    return [name for name in names if any(re.match(tag, name) for tag in tags)]


class Sink(abc.ABC):
    """A place that metrics are sent to."""

    @abc.abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a step; all of them are finite."""

    @abc.abstractmethod
    def close(self) -> None:
        """Training has ended."""


def open_sinks(recipe: Recipe, resumed_step: int) -> Iterator[Sink]:
    """Those that a recipe asks for."""
    if recipe.logging.tensorboard:
        yield TensorBoard(recipe, resumed_step)
    if recipe.logging.wandb_project is not None:
        yield WandB(recipe, recipe.logging.wandb_project)
    if recipe.logging.trackio_project is not None:
        yield Trackio(recipe, recipe.logging.trackio_project)
    if recipe.logging.prometheus_folder is not None:
        yield Prometheus(recipe)


class TensorBoard(Sink):
    """RUN/tensorboard/: scalars, a layout of charts for them, the recipe as text and as hyper-parameters."""

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = recipe.run.output_dir / "tensorboard"
        self.writer: Any = SummaryWriter(str(folder), purge_step=resumed_step + 1)
        absent = {"Depth": not recipe.model.depth_limits, "Reinforcement learning": recipe.program != "rl"}
        charts = {name: own for name, own in CHARTS.items() if not absent.get(name)}
        self.writer.add_custom_scalars(
            {name: {title: ["Multiline", tags] for title, tags in own.items()} for name, own in charts.items()}
        )
        self.writer.add_text("recipe", "".join(f"    {line}\n" for line in to_yaml(recipe).splitlines()), resumed_step)
        validation = {"validation_loss": 0.0} if recipe.data.validation else {}
        # SummaryWriter.add_hparams would make a run of its own, whose metrics are those of its call.
        *begin, self.end = hparams(hyper_parameters(recipe), {"loss": 0.0, "tokens_per_s": 0.0, **validation})
        for summary in begin:
            self.writer._get_file_writer().add_summary(summary)
        self.writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except OSError as error:  # TensorBoard's writer does not recover
            logger.warning(f"TensorBoard ends at step {step} ({error.strerror}); metrics.jsonl continues")
            self.writer = None

    def close(self) -> None:
        if self.writer is not None:
            with contextlib.suppress(OSError):  # a full disk: metrics.jsonl has everything
                self.writer._get_file_writer().add_summary(self.end)
                self.writer.close()


def hyper_parameters(recipe: Recipe) -> dict[str, float | str]:
    """The fields of a recipe that are set, flat, as in {"training.num_steps": 1000}."""
    found: dict[str, float | str] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(f"{prefix}.{name}" if prefix else str(name), inner)
        elif isinstance(value, bool):
            found[prefix] = str(value).lower()  # else TensorBoard shows a number
        elif value is not None:
            found[prefix] = value if isinstance(value, int | float | str) else str(value)

    visit("", to_dict(recipe))
    return found


class WandB(Sink):
    """A run of Weights & Biases, which a resume continues. The API key comes from W&B's own settings."""

    def __init__(self, recipe: Recipe, project: str) -> None:
        import wandb

        folder = real_path(recipe.run.output_dir)
        try:
            self.run = wandb.init(
                project=project,
                name=folder.name,
                id=_run_id(recipe),
                dir=folder,
                resume="allow",
                config=to_dict(recipe),
            )
        except wandb.Error as error:  # no key, for example
            raise UserError(
                f"logging.wandb_project={project}: {one_line(error)}; WANDB_MODE=offline writes to {folder} alone"
            ) from None
        self.run.define_metric("*", step_metric="step")  # W&B's own steps only count upwards: a resume repeats some

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio(Sink):
    """A run of trackio, which a resume continues: on this machine, or where trackio's own settings say."""

    def __init__(self, recipe: Recipe, project: str) -> None:
        import trackio

        name = f"{real_path(recipe.run.output_dir).name}-{_run_id(recipe)[:6]}"
        self.run = trackio.init(project=project, name=name, resume="allow", config=hyper_parameters(recipe))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def _run_id(recipe: Recipe) -> str:
    """The same for all starts of a run."""
    return hashlib.sha256(str(real_path(recipe.run.output_dir)).encode()).hexdigest()[:16]


class Prometheus(Sink):
    """FOLDER/megatron_tpt_RUN.prom, for node_exporter's textfile collector: the last report, until training ends.

    Format: https://prometheus.io/docs/instrumenting/exposition_formats/
    """

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.logging.prometheus_folder is not None
        folder = real_path(recipe.run.output_dir)
        self.run = str(folder)
        self.path = recipe.logging.prometheus_folder / f"megatron_tpt_{_run_id(recipe)}.prom"
        self.values: dict[str, float] = {}
        self.is_missing = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.values |= {"step": step, "report_time_seconds": time.time()} | dict(values)
        try:
            temporary = self.path.with_suffix(".new")  # the collector reads all *.prom, whole or not
            temporary.write_text(prometheus_text(self.values, self.run))
            os.replace(temporary, self.path)
            self.is_missing = False
        except OSError as error:
            if not self.is_missing:
                logger.warning(f"{self.path} cannot be written ({error.strerror}): will be retried")
            self.is_missing = True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()  # what is no longer measured must not be read as if it were


def prometheus_text(values: Mapping[str, float], run: str) -> str:
    """Metrics in Prometheus' text format: gauges named megatron_tpt_..., with the label `run`; what stands behind a
    slash in a metric's name (a source, a depth) is the label `part`."""
    families: dict[str, list[str]] = {}
    for name, value in values.items():
        family, slash, part = name.partition("/")
        family = f"megatron_tpt_{re.sub(r'[^a-zA-Z0-9_]', '_', family)}"
        labels = f'run="{_escaped(run)}"' + (f',part="{_escaped(part)}"' if slash else "")
        if math.isfinite(value):
            families.setdefault(family, []).append(f"{family}{{{labels}}} {float(value)!r}\n")
    return "".join(f"# TYPE {family} gauge\n{''.join(lines)}" for family, lines in families.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
