"""Everything that decides a training run, as nested dataclasses; a recipe file is their YAML.

A field's docstring is its documentation: it is what `--help` prints. `__post_init__` refuses what can be seen in one
section; `check` of the recipe what needs several, and the number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tpt.config.data import DataSection
from megatron_tpt.config.model import ModelConfig, default_model
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.rules import SHARED_RULES
from megatron_tpt.config.run import CheckpointConfig, FaultsConfig, LoggingConfig, ProfilingConfig, RunConfig
from megatron_tpt.config.training import TrainingConfig


@dataclass
class Recipe:
    """The sections that every kind of run has, and what the loader and the training loop ask of a kind.

    The kinds are subclasses in megatron_tpt/recipes/, which override what is particular to them.
    """

    program = ""  # the module of the package that runs it
    activity = ""  # what that program does, in words
    rules = SHARED_RULES  # which settings have an effect
    needs_start = False  # whether training.init_from must be given
    uncounted = "validation and checkpoints"  # what the time that is estimated does not include

    run: RunConfig = field(default_factory=RunConfig)
    """Run folder and seed."""
    model: ModelConfig = field(default_factory=default_model)
    """Family and shape of the model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over processes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Steps, batch, precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """What happens when training goes wrong."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics."""
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    """Traces."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What happens around training: built-in callbacks by name and a user's own (package.module:Class), each with its
    settings."""
    data: DataSection = field(default_factory=DataSection)
    """What to train on."""

    @classmethod
    def kinds(cls) -> Sequence[type["Recipe"]]:
        """All kinds of recipes, by whose fields an unknown one is explained."""
        return ()

    @classmethod
    def complete(cls, raw: dict[str, Any]) -> None:
        """Fill in, before the fields are read, what the content of a recipe file takes from elsewhere."""

    @classmethod
    def expand(cls, raw: dict[str, Any]) -> None:
        """Replace short forms in the content of a recipe file, whose fields are right, by what they mean."""

    def packed_prefixes(self) -> list[Path]:
        """The packed indices that are trained on; their rows are samples, whatever the sequence length."""
        return []

    @property
    def models_beside(self) -> tuple[int, int]:
        """Models of the same shape beside the one of the recipe: frozen ones, and ones that are trained too."""
        return 0, 0

    @property
    def most_generated_tokens(self) -> int:
        """Tokens that a run generates, at most."""
        return 0

    @property
    def gpu_share(self) -> float:
        """The share of each GPU's memory that other programs leave to the training."""
        return 1.0

    def beyond_the_end(self) -> Iterator[str]:
        """A line for every setting of steps that the run does not have."""
        training, first = self.training, self.profiling.first_step
        last = f"the run ends after training.num_steps={training.num_steps}"
        if first is not None and first > training.num_steps:
            yield f"profiling.first_step={first} has no effect: {last}"
        for item in training.skip_steps:
            if int(str(item).partition("-")[0]) > training.num_steps:
                yield f"training.skip_steps: {item} has no effect: {last}"
        if sum(stage.num_steps for stage in training.batch_size_ramp) >= training.num_steps:
            yield f"training.global_batch_size={training.global_batch_size} is never reached by batch_size_ramp: {last}"
