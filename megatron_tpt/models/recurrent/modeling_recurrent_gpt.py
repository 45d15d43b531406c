"""A recurrent model in plain PyTorch, on the layers of transformers 5. This file travels with exported models: it
imports nothing of this package but the files that travel with it.

    e = prelude(embedded tokens);  s = noise
    num_recurrences times:  s = block(adapter([s; e]))
    logits = output matrix(norm(coda(s)))

Every iteration has keys and values of its own, and so its own layers in the cache: first those of the prelude, then
those of the coda, then those of the block, iteration by iteration.

Early exit: with `exit_criterion` and `exit_threshold`, a generated token takes no further iteration once its state has
converged. Later tokens read the keys and values of its last iteration in place of those that it skipped. A prompt takes
all iterations: its tokens are computed together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

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


ExitCriterion = Literal["state", "entropy", "kl"]
"""What is below the threshold when a token exits:

- "state": the norm of the last change of its state, relative to the norm of the state;
- "entropy": that of the distribution of the next token, in nats. It costs a coda and an output matrix per iteration, as
  does
- "kl": the divergence of that distribution from the one after the iteration before, in nats.
"""


class _Iteration:
    """A cache as the block sees it in one iteration: its layers have other places there in each.

    Tokens that are `final`, bool [b, 1], keep the keys and values of the iteration before.
    """

    def __init__(self, cache: DynamicCache, iteration: int, num_layers: int, final: Tensor | None) -> None:
        self.cache, self.offset, self.num_layers, self.final = cache, iteration * num_layers, num_layers, final

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, [b, heads, all tokens, d], after those of the newest tokens were added."""
        place = layer_idx + self.offset
        if self.final is not None and self.offset:
            keep, before = self.final[:, None, :, None], self.cache.layers[place - self.num_layers]
            keys = torch.where(keep, before.keys[..., -1:, :], keys)
            values = torch.where(keep, before.values[..., -1:, :], values)
        return self.cache.update(keys, values, place, *args, **kwargs)


class _Trial:
    """A cache to which nothing is added."""

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, as if those of the newest tokens were added."""
        layer = self.cache.layers[layer_idx]
        return torch.cat((layer.keys, keys), dim=-2), torch.cat((layer.values, values), dim=-2)


class _Exit:
    """Finds the tokens that exit. `log_probabilities`: states [b, 1, h] -> fp32 [b, 1, vocabulary]."""

    def __init__(
        self, criterion: ExitCriterion, threshold: float, log_probabilities: Callable[[Tensor], Tensor]
    ) -> None:
        self.criterion, self.threshold, self.log_probabilities = criterion, threshold, log_probabilities
        self.last: Tensor | None = None

    def __call__(self, before: Tensor, state: Tensor) -> Tensor:
        """The states before and after an iteration, [b, 1, h] -> bool [b, 1]."""
        return self._measure(before, state) < self.threshold

    def _measure(self, before: Tensor, state: Tensor) -> Tensor:
        if self.criterion == "state":
            before, state = before.float(), state.float()
            return (state - before).norm(dim=-1) / state.norm(dim=-1)
        now = self.log_probabilities(state)
        last, self.last = self.last, now
        if self.criterion == "entropy":
            return -(now.exp() * now).sum(dim=-1)
        if last is None:  # after the first iteration there is nothing to compare with
            return torch.full_like(now[..., 0], torch.inf)
        return (now.exp() * (now - last)).sum(dim=-1)


@dataclass
class RecurrentModelOutput(BaseModelOutputWithPast):
    """Normed states, the cache, and the iterations that every token took, int64 [b, s]."""

    depths: Tensor | None = None


@dataclass
class RecurrentCausalLMOutput(CausalLMOutputWithPast):
    """Logits, the cache, and the iterations that every token took, int64 [b, s]."""

    depths: Tensor | None = None


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
        exit_criterion: ExitCriterion | None = None,
        exit_threshold: float | None = None,
        output_layer: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> RecurrentModelOutput:
        """Tokens [b, s] -> normed states [b, s, h]. `num_recurrences`: iterations, those of config.json when not given.
        `output_layer`: normed states -> logits; the criteria "entropy" and "kl" need it.

        Raises ValueError for a cache that was filled by another number of iterations, or of another kind, and for an
        early exit without a cache.
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
        if cache is not None:
            self._make_room(cache, recurrences)
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
        leave = self._exit(exit_criterion, exit_threshold, cache, output_layer, arguments)
        is_generated = cache is not None and cache.get_seq_length() > 0 and hidden.shape[1] == 1
        embedded = _run(self.prelude, hidden, cache, arguments)
        state = self._initial_state(position_ids, embedded)
        state, depths = self._recur(state, embedded, recurrences, cache, arguments, leave if is_generated else None)
        output = self.norm(_run(self.coda, state, cache, arguments))
        return RecurrentModelOutput(last_hidden_state=output, past_key_values=cache, depths=depths)

    def _initial_state(self, position_ids: Tensor, embedded: Tensor) -> Tensor:
        """[b, s, h]: by position alone, so that a text's logits depend neither on its row nor on what is cached."""
        config = self.config
        width, std, seed = config.hidden_size, config.initial_state_std, config.initial_state_seed
        return initial_state(position_ids, width, std, seed, embedded.dtype).expand_as(embedded)

    def _recur(
        self,
        state: Tensor,
        embedded: Tensor,
        recurrences: int,
        cache: DynamicCache | None,
        arguments: dict[str, Any],
        leave: _Exit | None,
    ) -> tuple[Tensor, Tensor]:
        """The last state of every token, [b, s, h], and the iterations that it took, int64 [b, s]."""
        num_layers = self.config.num_block_layers
        depths = torch.full(embedded.shape[:2], recurrences, device=embedded.device)
        final = None if leave is None else torch.zeros_like(depths, dtype=torch.bool)
        for iteration in range(recurrences):
            part = None if cache is None else _Iteration(cache, iteration, num_layers, final)
            before, state = state, _run(self.block, self.adapter(torch.cat((state, embedded), dim=-1)), part, arguments)
            if leave is None or final is None:
                continue
            state = torch.where(final[..., None], before, state)
            depths = torch.where(final, depths, iteration + 1)
            final = final | leave(before, state)
            if final.all():
                self._share(cache, iteration, recurrences)
                break
        return state, depths

    def _share(self, cache: Any, last: int, recurrences: int) -> None:
        """Give the newest token the keys and values of its `last` iteration in all later ones."""
        num_layers = self.config.num_block_layers
        first = self.config.num_prelude_layers + self.config.num_coda_layers
        for place in range(first + (last + 1) * num_layers, first + recurrences * num_layers):
            computed = cache.layers[place - num_layers]
            cache.update(computed.keys[..., -1:, :], computed.values[..., -1:, :], place)

    def _exit(
        self,
        criterion: ExitCriterion | None,
        threshold: float | None,
        cache: DynamicCache | None,
        output_layer: Callable[[Tensor], Tensor] | None,
        arguments: dict[str, Any],
    ) -> _Exit | None:
        """The rule by which tokens exit. Raises ValueError for one that is incomplete, or that cannot be applied."""
        if (criterion is None) != (threshold is None):
            raise ValueError("give exit_criterion and exit_threshold, or neither")
        if criterion is None or threshold is None:
            return None
        if criterion not in get_args(ExitCriterion):
            raise ValueError(f"exit_criterion={criterion!r}: known are {', '.join(get_args(ExitCriterion))}")
        if cache is None:
            raise ValueError("exit_criterion needs the cache: give use_cache=True")

        def log_probabilities(state: Tensor) -> Tensor:
            if output_layer is None:
                raise ValueError(f"exit_criterion={criterion!r} needs logits: use the model with its output matrix")
            normed = self.norm(_run(self.coda, state, _Trial(cache), arguments))
            return output_layer(normed).float().log_softmax(dim=-1)

        return _Exit(criterion, threshold, log_probabilities)

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
    """The model with its output matrix. generate() takes `num_recurrences`, `exit_criterion` and `exit_threshold` as
    forward() does."""

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
        exit_criterion: ExitCriterion | None = None,
        exit_threshold: float | None = None,
        **kwargs: Any,
    ) -> RecurrentCausalLMOutput:
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
            exit_criterion=exit_criterion,
            exit_threshold=exit_threshold,
            output_layer=self.lm_head,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return RecurrentCausalLMOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, depths=outputs.depths
        )
