"""A recurrent model in plain PyTorch, on the layers of transformers 5. This file travels with exported models: it
imports nothing of this package but the files that travel with it.

    e = prelude(embedded tokens);  s = noise
    num_recurrences times:  s = block(adapter([s; e]))
    logits = output matrix(norm(coda(s)))

Every iteration has keys and values of its own, and so its own layers in the cache: first those of the prelude, then
those of the coda, then those of the block, iteration by iteration.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama as llama
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.utils import can_return_tuple

from .configuration_recurrent_gpt import RecurrentGPTConfig
from .state import initial_state

_PARTS_OF_PARENTS: dict[str, tuple[Any, Any, Any]] = {
    "llama": (llama.LlamaDecoderLayer, llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding),
    "qwen2": (qwen2.Qwen2DecoderLayer, qwen2.Qwen2RMSNorm, qwen2.Qwen2RotaryEmbedding),
    "qwen3": (qwen3.Qwen3DecoderLayer, qwen3.Qwen3RMSNorm, qwen3.Qwen3RotaryEmbedding),
    "olmo2": (olmo2.Olmo2DecoderLayer, olmo2.Olmo2RMSNorm, olmo2.Olmo2RotaryEmbedding),
}
"""Decoder layer, norm and rotary positions, by `model_type`."""
_NOT_RECORDED = ("output_hidden_states", "output_attentions")


class _Iteration:
    """A cache as the block sees it in one iteration: its layers have other places there in each."""

    def __init__(self, cache: DynamicCache, offset: int) -> None:
        self.cache, self.offset = cache, offset

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [b, heads, all tokens, d], after those of the newest tokens were added."""
        return self.cache.update(keys, values, layer_idx + self.offset, *args, **kwargs)


class RecurrentGPTPreTrainedModel(PreTrainedModel):
    """What both classes below share."""

    config: RecurrentGPTConfig
    config_class = RecurrentGPTConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = [layer.__name__ for layer, _, _ in _PARTS_OF_PARENTS.values()]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class RecurrentGPTModel(RecurrentGPTPreTrainedModel):
    """The model without its output matrix."""

    def __init__(self, config: RecurrentGPTConfig) -> None:
        super().__init__(config)
        h, (layer, norm, rotary) = config.hidden_size, _PARTS_OF_PARENTS[config.parent_model_type]
        p, c = config.num_prelude_layers, config.num_coda_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, h)
        # Numbered by their places in the cache.
        self.prelude = nn.ModuleList(layer(config, i) for i in range(p))
        self.coda = nn.ModuleList(layer(config, p + i) for i in range(c))
        self.block = nn.ModuleList(layer(config, p + c + i) for i in range(config.num_block_layers))
        self.adapter = nn.Linear(2 * h, h, bias=False)
        self.norm = norm(h, eps=config.rms_norm_eps)
        self.rotary_emb = rotary(config=config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_recurrences: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens [b, s] -> normed states [b, s, h]. `num_recurrences`: iterations, those of config.json when not given.

        Raises ValueError for a cache that was filled by another number of iterations, or of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if refused := [name for name in _NOT_RECORDED if kwargs.pop(name, None)]:
            raise ValueError(f"{', '.join(refused)}: not supported by a recurrent model")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        recurrences = self.config.num_recurrences if num_recurrences is None else num_recurrences
        if recurrences < 1:
            raise ValueError(f"num_recurrences={recurrences} must be 1 or more")
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(first, first + hidden.shape[1], device=hidden.device)[None]
        arguments = {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(hidden, position_ids=position_ids),
            **kwargs,
        }
        if cache is not None:
            self._make_room(cache, recurrences)
        embedded = _run(self.prelude, hidden, cache, arguments)
        state = self._initial_state(position_ids, embedded)
        for iteration in range(recurrences):
            state = self._iterate(state, embedded, iteration, cache, arguments)
        output = self.norm(_run(self.coda, state, cache, arguments))
        return BaseModelOutputWithPast(last_hidden_state=output, past_key_values=cache)

    def _initial_state(self, position_ids: Tensor, embedded: Tensor) -> Tensor:
        """[b, s, h]: by position alone, so that a text's logits depend neither on its row nor on what is cached."""
        config = self.config
        width, std, seed = config.hidden_size, config.initial_state_std, config.initial_state_seed
        return initial_state(position_ids, width, std, seed, embedded.dtype).expand_as(embedded)

    def _iterate(
        self, state: Tensor, embedded: Tensor, iteration: int, cache: DynamicCache | None, arguments: dict[str, Any]
    ) -> Tensor:
        offset = iteration * self.config.num_block_layers
        part = None if cache is None else _Iteration(cache, offset)
        return _run(self.block, self.adapter(torch.cat((state, embedded), dim=-1)), part, arguments)

    def _make_room(self, cache: DynamicCache, recurrences: int) -> None:
        """Add the layers of `recurrences` iterations to a cache."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"{type(cache).__name__}: a recurrent model needs a DynamicCache, the default of generate()"
            )
        others = self.config.num_prelude_layers + self.config.num_coda_layers
        needed = others + recurrences * self.config.num_block_layers
        filled = sum(layer.get_seq_length() > 0 for layer in cache.layers)
        if filled not in (0, needed):
            before = (filled - others) // self.config.num_block_layers
            raise ValueError(f"the cache was filled with num_recurrences={before}, and now it is {recurrences}")
        cache.layers.extend(DynamicLayer() for _ in range(needed - len(cache.layers)))


def _run(layers: Iterable[nn.Module], hidden: Tensor, cache: Any, arguments: dict[str, Any]) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, past_key_values=cache, **arguments)
    return hidden


class RecurrentGPTForCausalLM(RecurrentGPTPreTrainedModel, GenerationMixin):
    """The model with its output matrix. generate() takes `num_recurrences` as forward() does."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecurrentGPTConfig) -> None:
        super().__init__(config)
        self.model = RecurrentGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_recurrences: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens [b, s] -> logits [b, s, vocabulary], or those of the positions `logits_to_keep`: the last ones if it
        is a number other than 0. With `labels` the loss too; its gradients go through all iterations."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_recurrences=num_recurrences,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
