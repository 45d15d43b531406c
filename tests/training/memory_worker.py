"""Builds what a recipe trains, does one step, and writes how many bytes each rank holds next to the run folder."""

import json
import sys
from pathlib import Path

import torch

from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.checkpoint_state import members
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache

from megatron.core import parallel_state


def num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    recipe = prepare(*load_recipe(PretrainRecipe, sys.argv[1:]))
    with distributed(recipe, before=prepare_cache):
        trainer = build_trainer(recipe, build_pretrain_data(recipe), default_callbacks())
        trainer.fit()
        parameters = [parameter for gpt in trainer.model.gpts for parameter in gpt.parameters()]
        state = []
        for member in members(trainer.model.optimizer):
            for group in member.optimizer.param_groups:
                for main in group["params"]:
                    state += [moment for name, moment in member.optimizer.state[main].items() if name != "step"]
                    state += [main] if recipe.training.dtype == "bfloat16" else []
        report = {
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "weights": num_bytes(parameters),
            "gradients": num_bytes([parameter.main_grad for parameter in parameters]),
            "optimizer": num_bytes(state),
        }
        path = Path(f"{recipe.run.output_dir}.memory-{torch.distributed.get_rank()}.json")
        path.write_text(json.dumps(report))
