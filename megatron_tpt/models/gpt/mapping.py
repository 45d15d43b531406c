"""Which tensor of a Hugging Face model is which tensor of a Megatron Core checkpoint.

`rows` is the table; a row's transform says how the tensors on its two sides become one another. It is about whole
tensors, as a checkpoint of any parallel layout describes them, so that layouts play no part here. The local and the
Transformer Engine kernels of Megatron Core store their weights under the same keys, those of Transformer Engine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_tpt.config.model import ModelConfig


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


SAME = Same()


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

    megatron: str
    """Key in the checkpoint, where the tensors of all layers are stacked along a leading axis."""
    hugging_face: dict[str, tuple[int, ...]]
    """Names and shapes; `{layer}` stands for the layer's number."""
    transform: Transform = SAME

    @property
    def megatron_shape(self) -> torch.Size:
        """Shape in the model, that is of one layer's tensor."""
        return self.transform.join([torch.empty(shape, device="meta") for shape in self.hugging_face.values()]).shape


def rows(model: ModelConfig) -> list[Row]:
    """The table for a model of the Llama and Qwen families, in the order of the forward pass."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    q, kv = model.num_attention_heads * d, model.query_groups * d
    vocabulary = Vocabulary(model.vocab_size or model.padded_vocab_size, model.padded_vocab_size)
    v = vocabulary.size
    qkv = QueryKeyValue(model.query_groups, model.num_attention_heads // model.query_groups, d)
    attention, mlp = "decoder.layers.self_attention.", "decoder.layers.mlp."
    hf = "model.layers.{layer}."
    bias = Row(
        f"{attention}linear_qkv.bias",
        {f"{hf}self_attn.q_proj.bias": (q,), f"{hf}self_attn.k_proj.bias": (kv,), f"{hf}self_attn.v_proj.bias": (kv,)},
        qkv,
    )
    output_bias = Row(f"{attention}linear_proj.bias", {f"{hf}self_attn.o_proj.bias": (h,)})
    fc1_bias = Row(f"{mlp}linear_fc1.bias", {f"{hf}mlp.gate_proj.bias": (f,), f"{hf}mlp.up_proj.bias": (f,)}, GateUp())
    fc2_bias = Row(f"{mlp}linear_fc2.bias", {f"{hf}mlp.down_proj.bias": (h,)})
    query_key_norms = [
        Row(f"{attention}q_layernorm.weight", {f"{hf}self_attn.q_norm.weight": (d,)}),
        Row(f"{attention}k_layernorm.weight", {f"{hf}self_attn.k_norm.weight": (d,)}),
    ]
    output = Row("output_layer.weight", {"lm_head.weight": (v, h)}, vocabulary)
    return [
        Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": (v, h)}, vocabulary),
        Row(f"{attention}linear_qkv.layer_norm_weight", {f"{hf}input_layernorm.weight": (h,)}),
        Row(
            f"{attention}linear_qkv.weight",
            {
                f"{hf}self_attn.q_proj.weight": (q, h),
                f"{hf}self_attn.k_proj.weight": (kv, h),
                f"{hf}self_attn.v_proj.weight": (kv, h),
            },
            qkv,
        ),
        *([bias] if model.qkv_bias else []),
        *(query_key_norms if model.qk_norm else []),
        Row(f"{attention}linear_proj.weight", {f"{hf}self_attn.o_proj.weight": (h, q)}),
        *([output_bias] if model.attention_output_bias else []),
        Row(f"{mlp}linear_fc1.layer_norm_weight", {f"{hf}post_attention_layernorm.weight": (h,)}),
        Row(
            f"{mlp}linear_fc1.weight",
            {f"{hf}mlp.gate_proj.weight": (f, h), f"{hf}mlp.up_proj.weight": (f, h)},
            GateUp(),
        ),
        *([fc1_bias] if model.mlp_bias else []),
        Row(f"{mlp}linear_fc2.weight", {f"{hf}mlp.down_proj.weight": (h, f)}),
        *([fc2_bias] if model.mlp_bias else []),
        Row("decoder.final_layernorm.weight", {"model.norm.weight": (h,)}),
        *([] if model.tie_embeddings else [output]),
    ]


def places(model: ModelConfig) -> Iterator[tuple[Row, int | None]]:
    """Every tensor of a model: its row and its layer (None outside the layers), in the order of the forward pass."""
    table = rows(model)
    in_layers = [row for row in table if row.megatron.startswith("decoder.layers.")]
    first = table.index(in_layers[0])
    yield from ((row, None) for row in table[:first])
    yield from ((row, layer) for layer in range(model.num_layers) for row in in_layers)
    yield from ((row, None) for row in table[first + len(in_layers) :])
