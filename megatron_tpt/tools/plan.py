"""Choose a layout on paper: memory, communication, bubble and step time of every layout of a recipe, the best first.

python tools/plan.py examples/tpt/pretrain_8b.yaml --gpus 512

python tools/plan.py examples/tpt/pretrain_8b.yaml --gpus 64 --gpu h200 --set training.fp8=tensorwise --json
"""

from megatron_tpt.config.cli import parse, program
from megatron_tpt.planning.options import PlanOptions


def main() -> None:
    options = parse(PlanOptions, description=__doc__)
    from megatron_tpt.config.load import load_recipe
    from megatron_tpt.planning.plan import plan
    from megatron_tpt.recipes import recipe_types

    [kind] = [kind for kind in recipe_types() if kind.program == options.program]
    recipe, _ = load_recipe(kind, [str(options.run), *(f"--{field}" for field in options.set)])
    recipe = recipe.resolve()
    plan(recipe.with_vocabulary(recipe.tokenizer(needs_data=False)), options)


command = program(main)

if __name__ == "__main__":
    command()
