"""Recurrent models as Megatron Core `GPTModel`s with another block of layers."""

from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.models.gpt.build import construct_model, finish_model
from megatron_tpt.models.recurrent.block import RecurrentBlock
from megatron_tpt.models.recurrent.config import RecurrentConfig

from megatron.core.models.gpt.gpt_model import GPTModel


def build_model(
    model: RecurrentConfig, parallel: ParallelConfig, training: TrainingConfig, *, seed: int | None
) -> GPTModel:
    """The model on this rank; see models.gpt.build.build_model. Its `extra_block_kwargs` are the arguments of
    RecurrentBlock.forward. Transformer Engine's layers are wired as those of a GPT are, and have not run yet."""
    model.check_layout(parallel, training)
    gpt = construct_model(model, parallel, training)
    gpt.decoder = RecurrentBlock.of(gpt.decoder, model)
    return finish_model(gpt, model, training, seed)
