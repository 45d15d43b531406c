"""Initializes the rows of the embedding and the output matrix for tokens that the initial weights lack.

If a tokenizer has grown after pre-training (tokens for chats), the rows of the new tokens are zero or untrained. They
are set to the mean of all other rows, which hardly changes the probabilities of known tokens.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch

from megatron_tpt.config.load import read_yaml
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.names import shown

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

logger = logging.getLogger(__name__)


def start_new_tokens(gpts: Sequence[GPTModel], recipe: Recipe, tokenizer_path: Path | None) -> None:
    """Initialize the rows of tokens that `training.init_from` lacks, as `training.new_token_rows` says, and report it.
    All ranks call it after loading the weights."""
    start = recipe.training.init_from
    if start is None or tokenizer_path is None:
        return
    known, new = _ids(start, tokenizer_path)
    if not new:
        return
    names = tokenizers.Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    listed = ", ".join(shown(str(names.id_to_token(id))) for id in new[:8]) + (" ..." if len(new) > 8 else "")
    choice = recipe.training.new_token_rows
    if choice == "mean":
        set_rows_to_mean(gpts, known, new)
    how = f"start at the mean of the other {len(known)}" if choice == "mean" else "stay as the checkpoint has them"
    logger.info(f"{len(new)} tokens that {start} lacks ({listed}): their rows {how} (training.new_token_rows)")


def _ids(start: Path, tokenizer_path: Path) -> tuple[list[int], list[int]]:
    """The ids of tokens that the checkpoint `start` has, and those that are new in a tokenizer."""
    own = tokenizers.Tokenizer.from_file(str(tokenizer_path / "tokenizer.json")).get_vocab(with_added_tokens=True)
    before = start / "tokenizer" / "tokenizer.json"
    if before.is_file():
        known = set(tokenizers.Tokenizer.from_file(str(before)).get_vocab(with_added_tokens=True).values())
    else:
        known = set(range((read_yaml(start / "recipe.yaml").get("model") or {}).get("vocab_size") or 0))
    return sorted(known), sorted(set(own.values()) - known)


@torch.no_grad()
def set_rows_to_mean(gpts: Sequence[GPTModel], known: Sequence[int], new: Sequence[int]) -> None:
    """Set the rows `new` of the embedding and of the output matrix to the mean of the rows `known`. All ranks call
    it."""
    for gpt in gpts:
        if gpt.pre_process:
            _set_rows(gpt.embedding.word_embeddings.weight, known, new)
        if gpt.post_process and gpt.output_layer.weight is not None:
            _set_rows(gpt.output_layer.weight, known, new)


def _set_rows(weight: torch.Tensor, known: Sequence[int], new: Sequence[int]) -> None:
    """`weight`: this tensor-parallel rank's rows, [padded vocabulary / tensor-parallel size, h]."""
    first = parallel_state.get_tensor_model_parallel_rank() * len(weight)

    def own(ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([id - first for id in ids if 0 <= id - first < len(weight)], device=weight.device).long()

    total = weight[own(known)].float().sum(dim=0)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    weight[own(new)] = (total / len(known)).to(weight.dtype)
