"""Tokens of an exported recurrent model stop to iterate when they have converged, in a batch as alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import some_tokens
from recurrent_exports import loaded, padded
from torch import Tensor

from megatron_tpt.models.recurrent.state import initial_state

MOST, NUM_NEW = 6, 20
SETTINGS: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Store:
    """Keys and values by iteration and layer, for transformers' layers."""

    def __init__(self, kept: dict[Any, tuple[Tensor, Tensor]] | None = None) -> None:
        self.kept, self.iteration = dict(kept or {}), -1

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        place = self.iteration, layer_idx
        if place in self.kept:
            keys, values = (torch.cat(pair, dim=2) for pair in zip(self.kept[place], (keys, values), strict=True))
        self.kept[place] = keys, values
        return keys, values


class Reference:
    """Greedy decoding of one prompt, token by token."""

    def __init__(self, model: Any, criterion: str, threshold: float) -> None:
        self.model, self.criterion, self.threshold = model, criterion, threshold
        self.store = Store()
        self.depths: list[int] = []
        self.measured: list[float] = []

    def run(self, layers: Any, hidden: Tensor, first: int, store: Store) -> Tensor:
        length = hidden.shape[1]
        positions = torch.arange(first, first + length)[None]
        mask = torch.full((length, first + length), float("-inf")).triu(first + 1)[None, None]
        rotary = self.model.model.rotary_emb(hidden, position_ids=positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=store)
        return hidden

    def logits(self, state: Tensor, first: int, store: Store) -> Tensor:
        store.iteration = -1
        return self.model.lm_head(self.model.model.norm(self.run(self.model.model.coda, state, first, store)))

    def measure(self, before: Tensor, state: Tensor, last: Tensor | None, now: Tensor) -> float:
        if self.criterion == "state":
            return float((state - before).norm() / state.norm())
        own = torch.distributions.Categorical(logits=now)
        if self.criterion == "entropy":
            return float(own.entropy())
        if last is None:
            return float("inf")
        return float(torch.distributions.kl_divergence(own, torch.distributions.Categorical(logits=last)))

    def step(self, tokens: Tensor, first: int) -> int:
        """The token after `tokens`, [1, s]."""
        inner, store, last = self.model.model, self.store, None
        store.iteration = -1
        embedded = self.run(inner.prelude, inner.embed_tokens(tokens), first, store)
        places = torch.arange(first, first + tokens.shape[1])[None]
        state = initial_state(places, embedded.shape[-1], self.model.config.initial_state_std, 0, embedded.dtype)
        depth = MOST
        for iteration in range(MOST):
            store.iteration = iteration
            read = inner.adapter(torch.cat((state, embedded), dim=-1))
            before, state = state, self.run(inner.block, read, first, store)
            if first == 0:
                continue
            now = self.logits(state, first, Store(store.kept))[0, -1]
            value, last = self.measure(before, state, last, now), now
            self.measured.append(value)
            if value < self.threshold:
                depth = iteration + 1
                break
        for place in [place for place in store.kept if 0 <= place[0] == depth - 1]:
            for skipped in range(depth, MOST):
                newest = tuple(tensor[:, :, -1:] for tensor in store.kept[place])
                old = store.kept[skipped, place[1]]
                store.kept[skipped, place[1]] = tuple(torch.cat(pair, dim=2) for pair in zip(old, newest, strict=True))
        self.depths.append(depth)
        return int(self.logits(state, first, store)[0, -1].argmax())

    def generate(self, prompt: Tensor) -> list[int]:
        tokens = [self.step(prompt, 0)]
        for first in range(prompt.shape[1], prompt.shape[1] + NUM_NEW - 1):
            tokens.append(self.step(torch.tensor([tokens[-1:]]), first))
        return tokens


def generate(model: Any, prompts: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """New tokens, and the iterations after which each was chosen, [b, NUM_NEW] both."""
    depths: list[Tensor] = []
    with model.register_forward_hook(lambda module, inputs, outputs: depths.append(outputs.depths[:, -1:])):
        tokens = model.generate(prompts, num_recurrences=MOST, **SETTINGS, **arguments)
    return tokens[:, prompts.shape[1] :], torch.cat(depths, dim=1)


@pytest.mark.parametrize(
    ("criterion", "parent"), [("state", "llama"), ("entropy", "llama"), ("kl", "llama"), ("state", "olmo2")]
)
@torch.no_grad()
def test_tokens_exit_as_in_plain_decoding(
    criterion: str,
    parent: str,
    exported: Callable[[str], Path],
) -> None:
    model, prompts = loaded(exported(parent)), [some_tokens(1, length) for length in (5, 12, 30)]
    full = Reference(model, criterion, -1.0)
    assert full.generate(prompts[0]) == generate(model, prompts[0])[0][0].tolist()
    values = sorted(value for value in full.measured if value != float("inf"))
    for share in (2, 4, 8, 16):  # the larger the threshold, the fewer the iterations; wanted are several depths
        middle = len(values) // share
        threshold = sum(values[middle : middle + 2]) / 2  # between two measured values: rounding decides nothing
        references = [Reference(model, criterion, threshold) for _ in prompts]
        expected = [reference.generate(prompt) for reference, prompt in zip(references, prompts, strict=True)]
        if len({depth for reference in references for depth in reference.depths}) > 2:
            break
    else:
        pytest.fail("no threshold leads to more than two depths")
    rule = {"exit_criterion": criterion, "exit_threshold": threshold}

    alone = [generate(model, prompt, **rule) for prompt in prompts]
    for reference, chosen, (tokens, depths) in zip(references, expected, alone, strict=True):
        assert tokens[0].tolist() == chosen
        assert depths[0].tolist() == reference.depths

    batch, mask = padded(prompts)
    tokens, depths = generate(model, batch, attention_mask=mask, **rule)
    assert torch.equal(tokens, torch.cat([one for one, _ in alone]))
    assert torch.equal(depths, torch.cat([one for _, one in alone]))


@torch.no_grad()
def test_a_threshold_that_nothing_meets_changes_nothing(exported: Callable[[str], Path]) -> None:
    model, prompt = loaded(exported("llama")), some_tokens(1, 9)
    tokens, depths = generate(model, prompt)
    assert depths.unique().tolist() == [MOST]
    for criterion in ("state", "entropy", "kl"):
        found, taken = generate(model, prompt, exit_criterion=criterion, exit_threshold=1e-30)
        assert torch.equal(found, tokens) and taken.unique().tolist() == [MOST]
    _, least = generate(model, prompt, exit_criterion="state", exit_threshold=1e9)
    assert least[0].tolist() == [MOST] + [1] * (NUM_NEW - 1)  # the first token is that of the prompt


def test_a_rule_that_cannot_be_applied_is_refused(exported: Callable[[str], Path]) -> None:
    model, prompt = loaded(exported("llama")), some_tokens(1, 4)
    for arguments, reported in (
        ({"exit_criterion": "state"}, "give exit_criterion and exit_threshold, or neither"),
        ({"exit_criterion": "steps", "exit_threshold": 1.0}, "exit_criterion='steps': known are state, entropy, kl"),
        ({"exit_criterion": "state", "exit_threshold": 1.0, "use_cache": False}, "needs the cache: give use_cache"),
    ):
        with pytest.raises(ValueError, match=reported):
            model.generate(prompt, **SETTINGS, **arguments)
