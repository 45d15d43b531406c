"""Everything that decides a training run, as nested dataclasses; a recipe file is their YAML.

A field's docstring is its documentation: it is what `--help` prints. `__post_init__` refuses what can be seen in one
section; `megatron_tpt.config.load.check` what needs several, and the number of processes.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_tpt.config.data import DataConfig, SftDataConfig
from megatron_tpt.config.model import ModelConfig
from megatron_tpt.config.optimizer import OptimizerConfig
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.run import CheckpointConfig, FaultsConfig, LoggingConfig, ProfilingConfig, RunConfig
from megatron_tpt.config.training import SftTrainingConfig, TrainingConfig
from megatron_tpt.errors import UserError


@dataclass
class Recipe:
    """Sections shared by pre-training and fine-tuning."""

    run: RunConfig = field(default_factory=RunConfig)
    """Run folder and seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
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


@dataclass
class PretrainRecipe(Recipe):
    """A pre-training or mid-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """Indexed datasets."""


@dataclass
class FinetuneRecipe(Recipe):
    """A supervised fine-tuning run."""

    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)
    """Steps or epochs, batch, precision."""
    data: SftDataConfig = field(default_factory=SftDataConfig)
    """Conversations, or prompts and responses."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer to fine-tune with: the one named, that of the packed data (PREFIX.tokenizer), or the one kept
        with the checkpoint to start from."""
        if self.data.tokenizer is not None:
            return self.data.tokenizer
        for prefix in self.data.train:
            if (folder := Path(f"{prefix}.tokenizer")).is_dir():
                return folder
        if self.training.init_from is None:
            raise UserError("data.tokenizer is not given, nor training.init_from, whose tokenizer would do: give one")
        return self.training.init_from / "tokenizer"
