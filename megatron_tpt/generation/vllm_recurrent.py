"""Recurrent models in vLLM, whose every iteration over a recurrent layer has a key/value cache of its own.

Imported by vLLM alone, when it loads such a model (vllm_plugin.py). The layers are vLLM's own; a layer's `Attention`
has a cache and no weights, so further iterations are copies of the layer with the same weights and another
`Attention`. The depth is fixed when the engine starts.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from megatron_tpt.generation.vllm_plugin import lacks_biases, num_cached_layers
from megatron_tpt.models.recurrent.state import initial_state

_POSITIONS_AT_ONCE = 1024


def _make_layer(vllm_config: VllmConfig, name: str) -> nn.Module:
    """A layer of the parent's kind. `name` has one integer, the layer's number, by which vLLM orders the caches."""
    config = vllm_config.model_config.hf_config
    match config.parent_model_type:
        case "llama":
            return LlamaDecoderLayer(vllm_config, name)
        case "qwen2":
            return Qwen2DecoderLayer(config, vllm_config.cache_config, prefix=name)
        case "qwen3":
            return Qwen3DecoderLayer(config, vllm_config.cache_config, prefix=name)
        case "olmo2":
            from megatron_tpt.generation.vllm_olmo2 import Olmo2DecoderLayer

            return Olmo2DecoderLayer(vllm_config, name)
        case other:
            raise ValueError(f"recurrent models of parent_model_type {other!r} are not supported in vLLM")


def _with_own_cache(layer: nn.Module, vllm_config: VllmConfig, name: str) -> nn.Module:
    """A layer with the weights of `layer` and another cache."""
    attention = layer.self_attn
    cache = Attention(
        attention.num_heads,
        attention.head_dim,
        attention.scaling,
        num_kv_heads=attention.num_kv_heads,
        cache_config=vllm_config.cache_config,
        prefix=f"{name}.self_attn.attn",
    )
    return _with_child(layer, "self_attn", _with_child(attention, "attn", cache))


def _with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A copy of `module` that shares all but one child."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: child}
    return copied


def _run(layers: Iterable[nn.Module], positions: Tensor, hidden: Tensor) -> Tensor:
    """[n, h] -> [n, h]. vLLM's layers leave their last addition to the norm that follows; here it may be another's."""
    residual = None
    for layer in layers:
        hidden, residual = layer(positions, hidden, residual)
    return hidden if residual is None else hidden + residual


@support_torch_compile
class RecurrentGPTModel(nn.Module):
    """Token ids to normed states; see models/recurrent/block.py for what it computes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        num_prelude, num_block = config.num_prelude_layers, config.num_block_layers
        width, num_layers = config.hidden_size, num_cached_layers(config)
        names = [f"{prefix}.layers.{number}" for number in range(num_layers)]
        block_names, coda_names = names[num_prelude:], names[num_layers - config.num_coda_layers :]
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, width, prefix=f"{prefix}.embed_tokens")
        self.prelude = nn.ModuleList(_make_layer(vllm_config, name) for name in names[:num_prelude])
        self.adapter = ReplicatedLinear(2 * width, width, bias=False, prefix=f"{prefix}.adapter")
        self.block = nn.ModuleList(_make_layer(vllm_config, name) for name in block_names[:num_block])
        self.later_iterations = nn.ModuleList(
            nn.ModuleList(
                _with_own_cache(layer, vllm_config, block_names[iteration * num_block + place])
                for place, layer in enumerate(self.block)
            )
            for iteration in range(1, config.num_recurrences)
        )
        self.coda = nn.ModuleList(_make_layer(vllm_config, name) for name in coda_names)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        positions = torch.arange(vllm_config.model_config.max_model_len).split(_POSITIONS_AT_ONCE)
        std, seed, dtype = config.initial_state_std, config.initial_state_seed, vllm_config.model_config.dtype
        states = torch.cat([initial_state(some, width, std, seed, dtype) for some in positions])
        self.register_buffer("initial_states", states, persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[n] -> [n, h]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids [n] of all sequences of a batch, or their embeddings [n, h], and positions [n] -> [n, h]."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        embedded = _run(self.prelude, positions, hidden)
        state = self.initial_states[positions]
        for layers in (self.block, *self.later_iterations):
            adapted, _ = self.adapter(torch.cat((state, embedded), dim=-1))
            state = _run(layers, positions, adapted)
        return self.norm(_run(self.coda, positions, state))


class RecurrentGPTForCausalLM(nn.Module):
    """What vLLM asks of a model. Without the interfaces for pipeline parallelism and LoRA, so that it refuses them."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.quant_config is not None:
            raise ValueError("quantization of recurrent models is not supported in vLLM")
        config = self.config = vllm_config.model_config.hf_config
        if lacks_biases(config):
            raise ValueError(f"{config.parent_model_type} layers with attention_bias are not supported in vLLM")
        self.model = RecurrentGPTModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[n] -> [n, h]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """See RecurrentGPTModel.forward. `intermediate_tensors` are those of pipeline parallelism."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[n, h] -> [n, v]; None where another tensor-parallel rank has the result."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their names in a model folder; returns the names of the parameters."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
