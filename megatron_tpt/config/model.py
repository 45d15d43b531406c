"""What every model family's configuration has, and the registry of families.

A family is a folder of megatron_tpt/models, named by `model.family`, whose `SPEC` (see models/spec.py) has the class of
its configuration. That class adds the family's own fields and says which tensors they describe: all counts of
parameters, operations and bytes follow from `weights` and `activations`. No torch.
"""

import functools
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tpt.config.fields import NonNegativeFloat, PositiveInt, check_bounds
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import UserError

DEFAULT_FAMILY = "gpt"
_FAMILIES = "megatron_tpt.models"


@dataclass(frozen=True)
class Weight:
    """A parameter tensor of a model, over all ranks."""

    key: str
    """Its name in checkpoints, where the tensors of all layers are stacked along a leading axis."""
    shape: tuple[int, ...]
    """Of one layer's tensor."""
    part: Literal["embedding", "block", "layer", "output"]
    """Where it is: on the first pipeline stage, there beside the layers, in every layer, or on the last stage."""
    is_split: bool = False
    """Whether tensor-parallel ranks have a share each, rather than a copy."""
    is_tied: bool = False
    """Whether it is a copy of the embedding: a separate tensor only on a last stage that is not also the first."""

    @property
    def size(self) -> int:
        """Its values."""
        return math.prod(self.shape)

    @property
    def is_block_matrix(self) -> bool:
        """Whether it is a matrix in or beside the layers: what Muon updates."""
        return self.part in ("block", "layer") and len(self.shape) == 2


@dataclass(frozen=True)
class Activation:
    """Values that a layer keeps of every token for its backward pass."""

    per_token: int
    is_split: bool
    """Whether tensor-parallel ranks have a share each; else they do only under sequence parallelism."""


@on_change(
    {
        (Effect.REFUSED, Effect.REFUSED): """
            family num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups head_dim
            tie_embeddings
        """,
        # Rows of the embedding are added for tokens that the checkpoint lacks (training.new_token_rows).
        (Effect.REFUSED, Effect.FREE): "vocab_size vocab_padding_multiple",
        (Effect.NONE, Effect.NONE): "init_std",
        (Effect.FREE, Effect.FREE): "preset max_position_embeddings transformer_impl",
    }
)
@dataclass
class ModelConfig(ABC):
    """A decoder-only transformer: the fields of every family."""

    family: str = DEFAULT_FAMILY
    """Model family: a folder of megatron_tpt/models. It decides which other fields there are."""
    preset: str | None = None
    """Name of a size preset of the family (gpt: megatron_tpt/models/gpt/presets.py) that fills in every field not
    given."""
    num_layers: PositiveInt = 2
    """Transformer blocks."""
    hidden_size: PositiveInt = 64
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt = 192
    """Width inside the feed-forward network (each of its two gated halves)."""
    num_attention_heads: PositiveInt = 4
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); as many as query heads when not given."""
    head_dim: PositiveInt | None = None
    """Width of one head; hidden_size / num_attention_heads when not given."""
    vocab_size: PositiveInt | None = None
    """Tokens in the vocabulary; the training data's tokenizer decides when not given."""
    vocab_padding_multiple: PositiveInt = 128
    """The embedding's rows are padded to a multiple of this, so that tensor parallelism divides them. It does not
    depend on the layout: a checkpoint fits any."""
    max_position_embeddings: PositiveInt = 8192
    """Longest sequence the model claims to handle (written to exports; rotary positions need no table)."""
    tie_embeddings: bool = False
    """Use the embedding matrix as output matrix too."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the initial weights; the two projections back into the residual stream get
    init_std / sqrt(2 * num_layers)."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Kernels: Transformer Engine's, Megatron Core's own in plain torch (local), or auto: local on a CPU,
    Transformer Engine on a GPU (an error when it is not installed)."""

    def __post_init__(self) -> None:
        check_bounds(self, "model.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} is not a multiple of model.num_attention_heads="
                f"{self.num_attention_heads}: change one of them or give model.head_dim"
            )
        if self.num_attention_heads % self.query_groups:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of model.num_query_groups="
                f"{self.query_groups}: change one of them"
            )

    @abstractmethod
    def weights(self) -> list[Weight]:
        """The parameters, in the order of the forward pass; those of a layer once."""

    @abstractmethod
    def activations(self, sequence_length: int) -> dict[str, Activation]:
        """What a layer keeps for its backward pass, by what recomputes it: the names are those of
        training.recompute_modules, and others for what only recomputation of the whole layer saves."""

    @property
    def activation_layers(self) -> float:
        """Layers whose activations are kept for the backward pass, one that is passed again counted again."""
        return self.num_layers

    def passes(self, measured: Mapping[str, float] | None = None) -> dict[str, float]:
        """How often a token of training passes what the FLOPs consist of: "layer", layers, and "block", the matrices
        beside them. A pass without a backward pass counts a third, since that takes twice as much as the forward pass.
        `measured`: metrics of some steps that tell it, such as a sampled depth; without them, what is expected."""
        return {"layer": self.num_layers, "block": 0}

    def expected_passes(self, num_steps: int) -> dict[str, float]:
        """The mean of `passes` over a run of `num_steps` steps."""
        return self.passes()

    @property
    def depth_limits(self) -> tuple[int, ...]:
        """The smallest depths of the groups by which the loss is reported; empty where all tokens pass all layers
        once."""
        return ()

    def draws(self, step: int, seed: int, *, training: bool) -> dict[str, int]:
        """What the decoder and the metrics must know about a micro-batch of the step that follows `step` others, by
        name. All ranks have the same `seed` for their micro-batch of the same number, so they take the same decisions;
        in validation (not `training`) nothing is left to chance."""
        return {}

    def check_layout(self, parallel: ParallelConfig, training: TrainingConfig) -> None:  # noqa: B027 (most check nothing)
        """Raise UserError for what this family does not support."""

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to the padding multiple."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not known: give it, or training data whose tokenizer decides it")
        return -(-self.vocab_size // self.vocab_padding_multiple) * self.vocab_padding_multiple

    def num_parameters(self) -> int:
        """All parameters, with the padded embedding rows."""
        return sum(
            weight.size * (self.num_layers if weight.part == "layer" else 1)
            for weight in self.weights()
            if not weight.is_tied
        )


@functools.cache
def families() -> tuple[str, ...]:
    """The names that model.family takes: the folders of megatron_tpt/models."""
    folders = importlib.import_module(_FAMILIES).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders) if module.ispkg))


def spec_named(family: Any) -> Any:
    """The `SPEC` of a family, a models.spec.ModelSpec. Raises UserError for a family that there is not."""
    if family not in families():
        raise UserError(f"model.family={family} is not known: use one of {', '.join(families())}")
    return importlib.import_module(f"{_FAMILIES}.{family}").SPEC


def config_class(model: Mapping[str, Any]) -> type[ModelConfig]:
    """The class of the configuration that the mapping `model` of a recipe describes. Raises UserError as above."""
    config: type[ModelConfig] = spec_named(model.get("family", DEFAULT_FAMILY)).config
    return config


def section_classes(cls: type) -> list[type]:
    """The classes that a section of a recipe may be of: of the model, those of all families, the default one first."""
    if cls is not ModelConfig:
        return [cls]
    return [spec_named(name).config for name in sorted(families(), key=lambda name: name != DEFAULT_FAMILY)]


def default_model() -> ModelConfig:
    """The model of a recipe without the section."""
    return config_class({})()
