"""A recurrent model put together from transformers' own layers: the independent reference of ours."""

from pathlib import Path

import torch
import transformers
from torch import Tensor

from megatron_tpt.models.recurrent.state import initial_state


class Unrolled(torch.nn.Module):
    """The layers of a transformers model, passed in any order, with an adapter on [state; embeddings]."""

    def __init__(self, folder: Path, layers: list[int], split: tuple[int, int, int]) -> None:
        super().__init__()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        self.embedding, self.norm, self.rotary = model.model.embed_tokens, model.model.norm, model.model.rotary_emb
        self.head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        self.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in layers)
        self.split = split
        h = model.config.hidden_size
        self.adapter = torch.nn.Parameter(torch.cat((torch.zeros(h, h), torch.eye(h)), dim=1))

    def stack(self, places: range, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotary = self.rotary(hidden, positions)
        for place in places:
            hidden = self.layers[place](
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False
            )
        return hidden

    def forward(self, tokens: Tensor, without: int, with_gradient: int, state: Tensor) -> Tensor:
        """[b, s] and the initial state [b, s, h] -> logits [b, s, v]."""
        p, r, c = self.split
        embedded = self.stack(range(p), self.embedding(tokens))
        for iteration in range(without + with_gradient):
            if iteration == without:
                state = state.detach()  # nothing before it is reached by the backward pass
            read = torch.cat((state, embedded), dim=-1) @ self.adapter.T
            state = self.stack(range(p, p + r), read)
        return self.norm(self.stack(range(p + r, p + r + c), state)) @ self.head.T


def state_of_validation(tokens: Tensor, width: int, std: float) -> Tensor:
    """[b, s, h]: by position alone."""
    one = initial_state(torch.arange(tokens.shape[1]), width, std, 0, torch.float32)
    return one.expand(tokens.shape[0], -1, -1)


def state_of_training(tokens: Tensor, width: int, std: float, seed: int) -> Tensor:
    """[b, s, h]: by the place of the token in the micro-batch."""
    places = torch.arange(tokens.numel()).view(tokens.shape)
    return initial_state(places, width, std, seed, torch.float32)
