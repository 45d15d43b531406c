"""Conversion of a family's models to Hugging Face folders and back: the adapter, and its table of tensors.

A row of the table lists the Hugging Face tensors that correspond to one tensor of a Megatron Core checkpoint; its
transform converts between the two. Rows refer to full tensors, as checkpoints of any parallel layout describe them, so
that layouts do not matter here. Megatron Core's local kernels store their weights under the same keys as its
Transformer Engine kernels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tpt.config.model import ModelConfig, Weight


class Transform(Protocol):
    """Converts between one Megatron Core tensor and the Hugging Face tensors of the same row."""

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """The Hugging Face tensors of a Megatron Core tensor, in the order of the row."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Megatron Core tensor of the Hugging Face tensors, given in the order of the row."""


class Same:
    """One tensor, the same on both sides."""

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]


class GateUp:
    """The gate's rows above those of the up-projection: [2 f, h] from [f, h] and [f, h]; biases lack the last axis."""

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.chunk(2)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))


@dataclass(frozen=True)
class QueryKeyValue:
    """Group by group: the query heads that share a key/value head, then the key head, then the value head.

    [num_groups (num_queries + 2) head_dim, h] from queries [num_groups num_queries head_dim, h] and keys and values
    [num_groups head_dim, h]; biases lack the last axis.
    """

    num_groups: int
    num_queries: int
    """Query heads of one group."""
    head_dim: int

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        rest = tensor.shape[1:]
        groups = tensor.reshape(self.num_groups, self.num_queries + 2, self.head_dim, *rest)
        return [part.reshape(-1, *rest) for part in groups.split([self.num_queries, 1, 1], dim=1)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        rest = tensors[0].shape[1:]
        parts = [tensor.reshape(self.num_groups, -1, self.head_dim, *rest) for tensor in tensors]
        return torch.cat(parts, dim=1).reshape(-1, *rest)


@dataclass(frozen=True)
class Vocabulary:
    """Rows of zeros after the last token: [padded_size, h] from [size, h]."""

    size: int
    padded_size: int

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor[: self.size]]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, self.padded_size - self.size))


@dataclass(frozen=True)
class Row:
    """One Megatron Core tensor and the corresponding Hugging Face tensors."""

    weight: Weight
    names: tuple[str, ...]
    """Names of the Hugging Face tensors; `{layer}` stands for the name of the layer, such as layers.3."""
    transform: Transform

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors, by name."""
        parts = self.transform.split(torch.empty(self.weight.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.names, parts, strict=True)}


class HuggingFaceAdapter[C: ModelConfig](ABC):
    """Converts a family's models to and from Hugging Face's format."""

    architectures: tuple[str, ...]
    """The classes of transformers that compute the same function: `architectures` of a config.json."""
    embedding_name = "model.embed_tokens.weight"
    """The name of the embedding in a Hugging Face folder."""
    output_name = "lm_head.weight"
    """The name of the output matrix, which is optional in a model with tied embeddings."""

    @abstractmethod
    def from_config(self, config: dict[str, Any], source: Path) -> C:
        """The model of a config.json of one of `architectures`, which `source` names in messages.

        Raises UserError when the model needs something that the family lacks.
        """

    @abstractmethod
    def to_config(
        self, model: C, *, dtype: str, token_ids: dict[str, Any], original: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The content of config.json. Fields that do not affect the computation are kept from `original`, the
        config.json that the model was imported from. Raises UserError when no architecture computes the same as the
        model."""

    @abstractmethod
    def notes(self, config: dict[str, Any]) -> list[str]:
        """Notes about fields of a config.json that have no effect here and are kept for exports, or are dropped."""

    @abstractmethod
    def rows(self, model: C) -> list[Row]:
        """The table for a model, in the order of the forward pass."""

    def layer_name(self, model: C, layer: int) -> str:
        """The name of a layer in the Hugging Face model, by its number."""
        return f"layers.{layer}"

    def names(self, model: C, row: Row, layer: int | None) -> list[str]:
        """The Hugging Face tensors of a row, which are those of `layer` if the row is one of the layers'."""
        named = None if layer is None else self.layer_name(model, layer)
        return [name.format(layer=named) for name in row.names]

    @property
    def code(self) -> tuple[Path, ...]:
        """Files with the model's classes that an export has, for a model that transformers does not have itself."""
        return ()

    def places(self, model: C) -> Iterator[tuple[Row, int | None]]:
        """The row and layer of every tensor of a model (the layer is None outside the layers), in the order of the
        forward pass."""
        rows = self.rows(model)
        yield from ((row, None) for row in rows if row.weight.part in ("embedding", "block"))
        in_layers = [row for row in rows if row.weight.part == "layer"]
        yield from ((row, layer) for layer in range(model.num_layers) for row in in_layers)
        yield from ((row, None) for row in rows if row.weight.part == "output")
