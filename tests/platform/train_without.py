"""Train a little, save and load, without one contact with Megatron Core: python train_without.py NAME FOLDER [torchrun]

NAME is that of a function in megatron_tpt/platform/megatron_core.py, or "nothing"; "nothing-fsdp" trains with FSDP.
"""

import errno
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_tpt

removed, folder = sys.argv[1], Path(sys.argv[2])
# The package adapts Megatron Core as it is imported; so its module is put in place before, changed.
name = "megatron_tpt.platform.megatron_core"
spec = importlib.util.spec_from_file_location(name, Path(megatron_tpt.__file__).parent / "platform/megatron_core.py")
contact = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contact)
if not removed.startswith("nothing"):
    assert hasattr(contact, removed)
    setattr(contact, removed, lambda *_: None)

import torch  # noqa: E402

from megatron_tpt import platform  # noqa: E402
from megatron_tpt.config.optimizer import OptimizerConfig  # noqa: E402
from megatron_tpt.config.parallel import ParallelConfig  # noqa: E402
from megatron_tpt.config.run import RunConfig  # noqa: E402
from megatron_tpt.config.training import TrainingConfig  # noqa: E402
from megatron_tpt.models.gpt.config import GPTConfig  # noqa: E402
from megatron_tpt.models.spec import build_chunks  # noqa: E402
from megatron_tpt.objectives.language_modeling import LanguageModeling  # noqa: E402
from megatron_tpt.recipes.pretrain import PretrainRecipe  # noqa: E402
from megatron_tpt.training.batches import Batch  # noqa: E402
from megatron_tpt.training.checkpoint_files import step_folder  # noqa: E402
from megatron_tpt.training.checkpoint_loading import load_checkpoint  # noqa: E402
from megatron_tpt.training.checkpoint_saving import SaveError, save_checkpoint  # noqa: E402
from megatron_tpt.training.optimizer import build_optimizer, wrap_model  # noqa: E402
from megatron_tpt.training.steps import compute_sums  # noqa: E402

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402
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


OF_FSDP = ("nothing-fsdp", "patch_fsdp", "copy_main_weights_to_model")


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


def check_a_failed_save(save: Callable[[int], None]) -> None:
    """A first rank that cannot write the index of a checkpoint says so, to all ranks."""
    FileSystemWriterAsync.finish = fail
    try:
        save(3)
    except SaveError:
        return
    raise AssertionError("a failed save is no failure")


def check_rotary_factors() -> None:
    """The factor of yarn has an effect."""

    def loss(factor: float) -> torch.Tensor:
        model = GPTConfig(
            vocab_size=100, rope_scaling_type="yarn", rope_scaling_factor=4.0, rope_attention_factor=factor
        )
        (gpt,) = build_chunks(model, ParallelConfig(), TrainingConfig(dtype="float32"), seed=1)
        tokens = torch.arange(16)[None]
        return gpt(tokens, tokens, attention_mask=None, labels=tokens)

    assert not torch.equal(loss(0.5), loss(2.0))


def run(chunks: list[torch.nn.Module], *, forward_only: bool = False) -> torch.Tensor:
    batch = Batch(batches(100, 16), seeds=[1, 2], num_tokens=64)
    return compute_sums(chunks, batch, LanguageModeling(), forward_only=forward_only)


def train_a_step(chunks: list[torch.nn.Module], optimizer: Any) -> None:
    chunks[0].zero_grad_buffer()
    optimizer.zero_grad()
    run(chunks)
    optimizer.step()


@torch.no_grad()
def validate(chunks: list[torch.nn.Module]) -> torch.Tensor:
    """Loss sums on the same tokens every time, without dropout."""
    chunks[0].eval()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        sums = run(chunks, forward_only=True)
    chunks[0].train()
    return sums


def main() -> None:
    assert "torch._inductor.compile_fx" not in sys.modules, "torch.compile is on"
    world_size = platform.world_size_from_environment()
    recipe = PretrainRecipe(
        run=RunConfig(output_dir=folder),
        model=GPTConfig(vocab_size=100, hidden_size=32, hidden_dropout=0.1, tie_embeddings=world_size > 1),
        parallel=ParallelConfig(
            pipeline_parallel_size=world_size, fsdp="optim_grads" if removed in OF_FSDP else "none"
        ),
        training=TrainingConfig(dtype="bfloat16", sequence_length=16, micro_batch_size=2, recompute="full"),
        optimizer=OptimizerConfig(clip_grad=0.1),
    )
    with platform.process_groups(recipe.parallel, timeout_s=60):
        platform.seed_everything(1)
        gpts = build_chunks(recipe.model, recipe.parallel, recipe.training, seed=1)
        chunks = wrap_model(gpts, recipe)
        optimizer = build_optimizer(chunks, recipe)
        untrained = validate(chunks)
        for _ in range(2):
            train_a_step(chunks, optimizer)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(parents=True, exist_ok=True)
        (tokenizer / "tokenizer.json").write_text("{}")

        def save(step: int) -> None:
            save_checkpoint(step_folder(folder, step), gpts, optimizer, {}, recipe_yaml="", tokenizer_path=tokenizer)

        save(2)
        assert not multiprocessing.active_children(), "a process for the queue of results"
        before = validate(chunks)
        assert world_size > 1 or not torch.equal(before, untrained)
        train_a_step(chunks, optimizer)
        assert not torch.equal(before, validate(chunks))  # after a forward pass Megatron FSDP hides its shards
        load_checkpoint(step_folder(folder, 2), gpts, optimizer)
        assert torch.equal(before, validate(chunks))
        assert get_model_config(chunks[0]).bf16
        if world_size == 1:
            check_a_failed_save(save)
            check_rotary_factors()


if __name__ == "__main__":
    main()
