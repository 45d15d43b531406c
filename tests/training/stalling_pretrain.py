"""Pre-trains as megatron_tpt.pretrain does, on a file system that fails or is slow.

--stall=read:RANK:STEP    reading the data of that step never ends on that rank
--stall=forward:RANK:STEP the forward pass of that step never ends on that rank; pipeline stages wait as on GPUs
--stall=slow:SECONDS      every sample of the validation data takes so long to read, and every flush to the disk
"""

import os
import sys
import time

import torch

from megatron_tpt.config.cli import run
from megatron_tpt.config.load import load_recipe
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.recipes.program import prepare
from megatron_tpt.training.callbacks import default_callbacks
from megatron_tpt.training.data import TrainingData
from megatron_tpt.training.launch import distributed
from megatron_tpt.training.pretrain_data import build_pretrain_data, prepare_cache
from megatron_tpt.training.trainer import Trainer


class SlowDataset(torch.utils.data.Dataset):
    """Sleeps before it reads a sample from `first_slow` on."""

    def __init__(self, dataset: torch.utils.data.Dataset, first_slow: int, seconds: float) -> None:
        self.dataset, self.first_slow, self.seconds = dataset, first_slow, seconds

    def __getattr__(self, name: str):
        return getattr(self.dataset, name)

    def __getitem__(self, index: int):
        if index >= self.first_slow:
            time.sleep(self.seconds)
        return self.dataset[index]


def stall(data: TrainingData, recipe: PretrainRecipe, kind: str, *numbers: str) -> None:
    if kind == "slow":
        for loader in data.validation.values():
            loader.dataset = SlowDataset(loader.dataset, 0, float(numbers[0]))
        flush = os.fsync
        os.fsync = lambda descriptor: (time.sleep(float(numbers[0])), flush(descriptor))[1]
    elif torch.distributed.get_rank() == int(numbers[0]):
        first_slow = recipe.training.num_samples(int(numbers[1]) - 1)
        data.train.dataset = SlowDataset(data.train.dataset, first_slow, 3600)


class Queued:
    """Communication as NCCL has it: waiting for it only queues it, and torch.cuda.synchronize waits."""

    def __init__(self) -> None:
        self.works: list[torch.distributed.Work] = []

    def wait(self) -> None: ...

    def synchronize(self) -> None:
        while self.works:
            self.works.pop(0).wait()


def stall_forward(trainer: Trainer, rank: str, step: str) -> None:
    queued, start = Queued(), torch.distributed.batch_isend_irecv
    torch.distributed.batch_isend_irecv = lambda operations: queued.works.extend(start(operations)) or [queued]
    torch.cuda.synchronize = queued.synchronize

    def wait_for_ever(module, inputs):
        if trainer.step + 1 == int(step) and torch.distributed.get_rank() == int(rank):
            time.sleep(3600)

    trainer.gpts[0].decoder.register_forward_pre_hook(wait_for_ever)


def main() -> None:
    option = next(argument for argument in sys.argv if argument.startswith("--stall="))
    recipe = prepare(*load_recipe(PretrainRecipe, [argument for argument in sys.argv[1:] if argument != option]))
    with distributed(recipe, before=prepare_cache):
        data, flush = build_pretrain_data(recipe), os.fsync
        kind, *numbers = option.removeprefix("--stall=").split(":")
        if kind != "forward":
            stall(data, recipe, kind, *numbers)
        trainer = Trainer(recipe, data, default_callbacks())
        if kind == "forward":
            stall_forward(trainer, *numbers)
        trainer.fit()
        os.fsync = flush


if __name__ == "__main__":
    run(main)
