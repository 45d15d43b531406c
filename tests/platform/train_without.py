"""Train a little, save and load, with one of the CPU patches left out: python train_without.py PATCH FOLDER [torchrun]

PATCH is the name of a function in megatron_tpt/platform/cpu.py, or "nothing".
"""

import importlib.util
import sys
from pathlib import Path

import megatron_tpt

left_out, folder = sys.argv[1], Path(sys.argv[2])
# The package adapts Megatron Core as it is imported; so its module is put in place before, changed.
name = "megatron_tpt.platform.cpu"
spec = importlib.util.spec_from_file_location(name, Path(megatron_tpt.__file__).parent / "platform/cpu.py")
cpu = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
if left_out != "nothing":
    assert hasattr(cpu, left_out)
    setattr(cpu, left_out, lambda: None)

import torch  # noqa: E402

from megatron_tpt import platform  # noqa: E402
from megatron_tpt.config.model import ModelConfig  # noqa: E402
from megatron_tpt.config.optimizer import OptimizerConfig  # noqa: E402
from megatron_tpt.config.parallel import ParallelConfig  # noqa: E402
from megatron_tpt.config.run import RunConfig  # noqa: E402
from megatron_tpt.config.training import TrainingConfig  # noqa: E402
from megatron_tpt.models.gpt import build_chunks  # noqa: E402
from megatron_tpt.recipes.pretrain import PretrainRecipe  # noqa: E402
from megatron_tpt.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from megatron_tpt.training.checkpoint_files import step_folder  # noqa: E402
from megatron_tpt.training.optimizer import build_optimizer, wrap_model  # noqa: E402
from megatron_tpt.training.steps import run_microbatches  # noqa: E402

from megatron.core import jit  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402


def batches(vocab_size: int, length: int):
    while True:
        text = torch.randint(0, vocab_size, (2, length + 1))
        yield {
            "tokens": text[:, :-1],
            "labels": text[:, 1:],
            "loss_mask": torch.ones(2, length),
            "is_thinking": torch.zeros(2, length, dtype=torch.bool),
            "position_ids": torch.arange(length).expand(2, -1),
        }


def main() -> None:
    assert jit.jit_fuser is jit.noop_decorator, "torch.compile is on"
    world_size = platform.world_size_from_environment()
    recipe = PretrainRecipe(
        run=RunConfig(output_dir=folder),
        model=ModelConfig(vocab_size=100, hidden_size=32, hidden_dropout=0.1, tie_embeddings=world_size > 1),
        parallel=ParallelConfig(
            pipeline_parallel_size=world_size, fsdp="optim_grads" if left_out == "patch_fsdp" else "none"
        ),
        training=TrainingConfig(dtype="bfloat16", sequence_length=16, micro_batch_size=2, recompute="full"),
        optimizer=OptimizerConfig(clip_grad=0.1),
    )
    with platform.process_groups(recipe.parallel, timeout_s=60):
        platform.seed_everything(1)
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=1)
        chunks = wrap_model(gpts, recipe)
        optimizer = build_optimizer(chunks, recipe)
        for _ in range(2):
            chunks[0].zero_grad_buffer()
            optimizer.zero_grad()
            run_microbatches(
                chunks,
                batches(100, 16),
                num_microbatches=2,
                micro_batch_size=2,
                sequence_length=16,
                packed_attention=False,
            )
            optimizer.step()
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(parents=True, exist_ok=True)
        (tokenizer / "tokenizer.json").write_text("{}")
        save_checkpoint(step_folder(folder, 2), gpts, optimizer, {}, recipe_yaml="", tokenizer_path=tokenizer)
        load_checkpoint(step_folder(folder, 2), gpts, optimizer)
        assert get_model_config(chunks[0]).bf16


if __name__ == "__main__":
    main()
