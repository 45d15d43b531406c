"""The section of a recipe on its data: indexed datasets to pre-train on, examples to fine-tune on."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_tpt.config.fields import NonNegativeInt, PositiveFloat, PositiveInt
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import require


@dataclass
class DataSection:
    """What to train on: the fields that all kinds of runs share."""

    train: list[Any] = field(default_factory=list)
    """The data to train on."""
    validation: list[Any] = field(default_factory=list)
    """The data to validate with."""
    tokenizer: Path | None = None
    """Folder of the tokenizer."""
    allow_change: bool = False
    """Resume from a checkpoint with other training data than before."""
    num_workers: NonNegativeInt = 0
    """Processes per rank that read ahead; 0 reads in the training process."""


@on_change(
    {
        (Effect.CONTENT, Effect.FREE): "path weight",
        (Effect.FREE, Effect.FREE): "name max_epochs",
    }
)
@dataclass
class DatasetSource:
    """One indexed dataset in a blend."""

    path: Path
    """Prefix of the files PREFIX.bin, PREFIX.idx and PREFIX.json that tools/index.py wrote; or of an index that
    tools/pack_sft.py has packed, of which only the answers have a loss."""
    weight: float = 1.0
    """Share of the training samples drawn from here, relative to the other weights."""
    name: str | None = None
    """Name in the metrics; sources of one name are counted together. The last part of the path when not given."""
    max_epochs: float | None = None
    """Refuse a run that reads this source more often; no limit when not given."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data: weight {self.weight} of {self.path} must be above 0")
        require(
            self.max_epochs is None or self.max_epochs > 0,
            f"data: max_epochs {self.max_epochs} of {self.path} must be above 0",
        )

    @property
    def shown_name(self) -> str:
        """The name given, or the last part of the path."""
        return self.name or self.path.name


@on_change({(Effect.CONTENT, Effect.FREE): "train until_tokens"})
@dataclass
class DataPhase:
    """A part of a run with its own blend."""

    train: list[DatasetSource] = field(default_factory=list)
    """The blend to train on, as in data.train."""
    until_tokens: PositiveFloat | None = None
    """Training tokens of the run, from its start, after which the next phase begins; the last phase needs none."""

    def end_sample(self, sequence_length: int) -> int | None:
        """The number of samples after which the next phase begins: the first that reaches the tokens."""
        return None if self.until_tokens is None else -(-int(self.until_tokens) // sequence_length)


@on_change(
    {
        (Effect.CONTENT, Effect.FREE): "train phases",
        (Effect.TOKENIZER, Effect.TOKENIZER): "tokenizer",
        (Effect.REFUSED, Effect.FREE): "mock",
        (Effect.WARNED, Effect.FREE): "reset_at_documents loss_on",
        (Effect.FREE, Effect.FREE): "validation allow_change cache_dir num_workers",
    }
)
@dataclass
class DataConfig(DataSection):
    """Pre-training data: indexed datasets, cut into samples of training.sequence_length tokens.

    A source is a prefix, or {path, weight, ...}. A path with wildcards (data/shard-*) means all indices that it
    matches, weighted by their tokens; one that ends with .yaml or .json means the list of sources in that file.
    """

    train: list[DatasetSource] = field(default_factory=list)
    """The blend to train on."""
    phases: list[DataPhase] = field(default_factory=list)
    """Blends to train on one after the other, in place of train. A source in several continues where it was."""
    validation: list[DatasetSource] = field(default_factory=list)
    """Sets whose losses are measured every training.validation_interval steps and at the end: over all of their tokens
    and, where there are several, each separately. Those of one name are one set, a blend."""
    tokenizer: Path | None = None
    """Folder of the tokenizer that the data was indexed with, for the checkpoints; its folder at that time when not
    given."""
    allow_change: bool = False
    """Resume from a checkpoint with other training data than before, more times through it, or another batch size or
    sequence length, at the samples consumed; without, that is refused."""
    reset_at_documents: bool = False
    """A token attends only to its own document, and positions count from 0 in each; without, to all before it in the
    sample."""
    loss_on: Literal["all", "document", "thinking"] = "all"
    """Tokens to learn from; the others are only read."""
    mock: bool = False
    """Random tokens in place of files, to measure speed; needs model.vocab_size."""
    cache_dir: Path | None = None
    """Where the sample indices are kept; `cache/` next to the first training index when not given."""

    def __post_init__(self) -> None:
        require(
            bool(self.train) + bool(self.phases) + self.mock <= 1,
            "data: give one of train, phases and mock: what is in train can be the first of phases",
        )
        ends = [0.0, *(phase.until_tokens or 0.0 for phase in self.phases[:-1])]
        require(
            all(end > begin for begin, end in itertools.pairwise(ends)),
            f"data.phases: until_tokens must be there and grow in all but the last: {ends[1:]}",
        )
        require(all(phase.train for phase in self.phases), "data.phases: a phase has no data: give its train")

    @property
    def all_phases(self) -> list[DataPhase]:
        """The phases; one that never ends when there is data.train."""
        return self.phases or [DataPhase(self.train)]


@on_change({(Effect.FREE, Effect.FREE): "path name"})
@dataclass
class ExampleSet:
    """Examples to validate with."""

    path: Path
    """Prefix of a packed index, or a file of JSON lines, as in data.train."""
    name: str | None = None
    """Name in the metrics; those of one name are one set. The last part of the path when not given."""

    @property
    def shown_name(self) -> str:
        """The name given, or the last part of the path."""
        return self.name or self.path.name


@on_change(
    {
        (Effect.CONTENT, Effect.FREE): "train weights num_examples prompt_column response_column on_too_long",
        (Effect.TOKENIZER, Effect.TOKENIZER): "tokenizer",
        (Effect.FREE, Effect.FREE): "validation allow_change num_workers",
    }
)
@dataclass
class SftDataConfig(DataSection):
    """Fine-tuning data: conversations, or prompts and responses; the loss is only on what the assistant says."""

    train: list[Path] = field(default_factory=list)
    """Prefixes of indices that tools/pack_sft.py has packed; or files (JSON lines, packed or not, Parquet, Arrow)
    with the fields `prompt` and `response`, which are tokenized and packed at the start of every run."""
    weights: list[PositiveFloat] = field(default_factory=list)
    """Of every packed index in train its share of the rows, relative to the other weights. An epoch then has as many
    rows as all of them together, and repeats or skips rows of each evenly; without, every row is read once."""
    num_examples: list[PositiveInt] = field(default_factory=list)
    """In place of weights: of every packed index in train the examples that an epoch draws, in whole rows. Of fewer
    than it has, the next epoch draws the next ones; more repeat them."""
    validation: list[ExampleSet] = field(default_factory=list)
    """Sets whose losses on the learned tokens are measured every training.validation_interval steps and at the end:
    over all of them and, where there are several, each separately. A path, or {path, name}."""
    tokenizer: Path | None = None
    """Hugging Face tokenizer folder; that of the packed data (PREFIX.tokenizer), else of training.init_from, when not
    given."""
    prompt_column: str = "prompt"
    """The column with the prompt."""
    response_column: str = "response"
    """The column with the response."""
    on_too_long: Literal["stop", "skip"] = "stop"
    """What to do with an example longer than training.sequence_length: stop, or skip it and say how many."""
    allow_change: bool = False
    """Resume from a checkpoint with other training data than before, or another batch size or sequence length, at the
    samples consumed; without, that is refused."""

    def __post_init__(self) -> None:
        for name in ("weights", "num_examples"):
            given = getattr(self, name)
            require(
                len(given) in (0, len(self.train)),
                f"data.{name} has {len(given)} values, data.train {len(self.train)}: give one for each, in its order",
            )
        require(
            not (self.weights and self.num_examples),
            "data.weights and data.num_examples both say how much to draw of each: give one of them",
        )
