"""How a family's models become Hugging Face folders and back: the adapter, and the table of tensors it is made of.

A row of the table says which Hugging Face tensors a tensor of a Megatron Core checkpoint is made of; its transform, how
the two sides become one another. Rows are about whole tensors, as a checkpoint of any parallel layout describes them,
so that layouts play no part here. The local and the Transformer Engine kernels of Megatron Core store their weights
under the same keys, those of Transformer Engine.
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
    """How one Megatron Core tensor and the Hugging Face tensors of the same row become one another."""

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
    """One Megatron Core tensor and the Hugging Face tensors it is made of."""

    weight: Weight
    names: tuple[str, ...]
    """Of the Hugging Face tensors; `{layer}` is replaced by the layer's number."""
    transform: Transform

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the Hugging Face tensors, by name."""
        parts = self.transform.split(torch.empty(self.weight.shape, device="meta"))
        return {name: tuple(part.shape) for name, part in zip(self.names, parts, strict=True)}


class HuggingFaceAdapter[C: ModelConfig](ABC):
    """A family's models in Hugging Face's terms."""

    architectures: tuple[str, ...]
    """The classes of transformers that compute the same: `architectures` of a config.json."""
    embedding_name = "model.embed_tokens.weight"
    """The embedding in a Hugging Face folder."""
    output_name = "lm_head.weight"
    """The output matrix there, which a model with tied embeddings may have or lack."""

    @abstractmethod
    def from_config(self, config: dict[str, Any], source: Path) -> C:
        """The model of a config.json of one of `architectures`, which `source` names in messages.

        Raises UserError when the model needs something that the family lacks.
        """

    @abstractmethod
    def to_config(
        self, model: C, *, dtype: str, token_ids: dict[str, Any], original: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The content of config.json; of the one that the model was imported from, `original`, the fields are kept that
        do not concern what it computes. Raises UserError when no architecture computes what the model does."""

    @abstractmethod
    def notes(self, config: dict[str, Any]) -> list[str]:
        """Lines about fields of a config.json that have no effect here and are kept for exports, or are dropped."""

    @abstractmethod
    def rows(self, model: C) -> list[Row]:
        """The table for a model, in the order of the forward pass."""

    def places(self, model: C) -> Iterator[tuple[Row, int | None]]:
        """Every tensor of a model: its row and its layer (None outside the layers), in the order of the forward
        pass."""
        rows = self.rows(model)
        yield from ((row, None) for row in rows if row.weight.part == "embedding")
        in_layers = [row for row in rows if row.weight.part == "layer"]
        yield from ((row, layer) for layer in range(model.num_layers) for row in in_layers)
        yield from ((row, None) for row in rows if row.weight.part == "output")
