"""Scores sequences that share beginnings, one by one and as trees. Each rank writes RUN.scores-RANK.pt."""

import random
import sys

import torch

from megatron_tpt import platform
from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.rl.rows import Branch, Packer, Tokens, Tree, length_of
from megatron_tpt.rl.scoring import Scorer
from megatron_tpt.training.builder import build_frozen_model
from megatron_tpt.training.launch import distributed


def random_tree(dice: random.Random) -> Tree:
    """A trunk of up to 24 tokens, with branches that leave it anywhere, also before its first token."""

    def ids(count: int) -> list[int]:
        return [dice.randrange(19) for _ in range(count)]

    trunk = ids(dice.randint(1, 24))
    places = sorted({0, *(dice.randrange(len(trunk) + 1) for _ in range(4))})
    return [
        Branch(place, Tokens([*trunk[:place], *ids(dice.randint(1, 3))], ids(dice.randint(1, 4)))) for place in places
    ]


def main() -> None:
    """Score with the model to start from."""
    recipe = prepare(*load_recipe(RLRecipe, sys.argv[1:]))
    trees = [random_tree(random.Random(seed)) for seed in range(11)]
    sequences = [branch.tokens for tree in trees for branch in tree]
    with distributed(recipe, before=RLRecipe.prepare_data):
        platform.seed_everything(recipe.run.seed)
        model = build_frozen_model(recipe, recipe.start)
        assert model.takes_branches
        scorer = Scorer(Packer(recipe), recipe.vocab_size, sequences_at_once=4)
        apart = scorer.statistics(model, sequences)[0]
        together, num_tokens = scorer.log_probabilities_of_trees(model, trees)
        assert num_tokens < sum(map(length_of, sequences))
        path = f"{recipe.run.output_dir}.scores-{torch.distributed.get_rank()}.pt"
        torch.save({"apart": apart, "together": together}, path)


if __name__ == "__main__":
    run(main)
