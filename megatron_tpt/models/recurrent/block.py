"""The layers of a recurrent model: prelude, iterations over the recurrent layers, coda, and the final norm.

e = prelude(embedded tokens);  s = noise
r times:  s = recurrent layers(adapter([s; e]))
output = norm(coda(s))
"""

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_tpt import platform  # noqa: F401  (adapts Megatron Core)
from megatron_tpt.models.recurrent.config import RecurrentConfig
from megatron_tpt.models.recurrent.state import initial_state

from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import make_viewless_tensor


class RecurrentBlock(TransformerBlock):
    """Megatron Core's block of layers, whose middle ones are passed several times.

    Parameters and checkpoint keys are those of the plain block, and `adapter.weight`, [h, 2 h]. The adapter is whole on
    every tensor-parallel rank.
    """

    @classmethod
    def of(cls, plain: TransformerBlock, model: RecurrentConfig) -> Self:
        """Takes over the modules of a plain block, the only kind that Megatron Core's GPTModel makes."""
        block = cls.__new__(cls)
        block.__dict__ = plain.__dict__
        h, config = model.hidden_size, plain.config
        block.model = model
        block.adapter = torch.nn.Linear(2 * h, h, bias=False, dtype=config.params_dtype)
        # Under sequence parallelism each rank has a part of the positions: finalize_model_grads sums the gradients.
        block.adapter.weight.sequence_parallel = config.sequence_parallel
        return block

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        draws: Mapping[str, int] | None = None,
        measured: dict[str, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        """Embedded tokens [s, b, h] -> normed states [s, b, h].

        `draws`: see RecurrentConfig.draws; without them, as in validation. `measured` receives fp32 [] sums over the
        tokens of all tensor-parallel ranks: "state_norm" and "state_change", the norms of the last state and of its
        last change.
        """
        unknown = {**others, "inference_context": inference_context}
        given = [name for name, value in unknown.items() if value is not None]
        assert not given, f"{given} are not supported by a recurrent block"
        draws = self.model.draws(0, 0, training=False) if draws is None else draws
        arguments = {
            "attention_mask": attention_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "packed_seq_params": packed_seq_params,
        }
        p, c = self.model.prelude_layers, len(self.layers) - self.model.coda_layers
        run = functools.partial(self._run, arguments=arguments)
        with get_cuda_rng_tracker().fork() if self.config.sequence_parallel else contextlib.nullcontext():
            inputs = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
            embedded = run(range(p), inputs)
            state = before = self._initial_state(embedded, draws["seed"])
            first_with_gradient = draws["recurrences"] - draws["backprop"]
            for iteration in range(draws["recurrences"]):
                with torch.no_grad() if iteration < first_with_gradient else contextlib.nullcontext():
                    before, state = state, run(range(p, c), self.adapter(torch.cat((state, embedded), dim=-1)))
                if iteration < first_with_gradient:
                    state = state.detach()  # layers enable gradients where they add biases
            if measured is not None:
                self._measure(state, before, measured)
            output = run(range(c, len(self.layers)), state)
        return make_viewless_tensor(inp=self.final_layernorm(output), requires_grad=True, keep_graph=True)

    def _initial_state(self, embedded: Tensor, seed: int) -> Tensor:
        """Noise [s, b, h]. In training every token of a micro-batch (of the same number on all data-parallel ranks) has
        its own; otherwise it depends on the position alone, so that a text's logits do not depend on its row."""
        length, rows, width = embedded.shape
        first, whole = 0, length
        if self.config.sequence_parallel:
            first = parallel_state.get_tensor_model_parallel_rank() * length
            whole = parallel_state.get_tensor_model_parallel_world_size() * length
        places = torch.arange(first, first + length, device=embedded.device)[:, None].expand(length, rows)
        if self.training:
            row = parallel_state.get_data_parallel_rank() * rows + torch.arange(rows, device=embedded.device)
            places = places + row * whole
        return initial_state(places, width, self.model.state_std, seed, embedded.dtype)

    def _run(self, places: Iterable[int], hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Pass some layers, whose activations are recomputed in the backward pass if the recipe says so.

        Not by Megatron Core's recomputation, under which the gradient of a weight arrives once per use: overlapped
        gradient reduction counts on the number of the first step.
        """
        config = self.config
        num_recomputed = 0
        if config.recompute_granularity == "full" and self.training and torch.is_grad_enabled():
            num_recomputed = len(self.layers) if config.recompute_method == "uniform" else config.recompute_num_layers
        for place in places:
            layer = functools.partial(self.layers[place], **arguments)
            if place < num_recomputed:
                hidden, _ = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden, _ = layer(hidden)
        return hidden

    @torch.no_grad()
    def _measure(self, state: Tensor, before: Tensor, measured: dict[str, Tensor]) -> None:
        state, before = state.float(), before.float()
        norms = torch.stack([one.norm(dim=-1).sum() for one in (state, state - before)])
        if self.config.sequence_parallel:
            torch.distributed.all_reduce(norms, group=parallel_state.get_tensor_model_parallel_group())
        measured["state_norm"], measured["state_change"] = norms
