"""PPO's critic: a second model of the policy's shape, whose output layer is replaced by a value head.

    RUN/critic/checkpoints/step_00000012/   at the steps of the policy's checkpoints, written before these

It is a trainer of its own, which takes a step before each of the policy's. A run that resumes from a checkpoint of the
policy resumes the critic from that of the same step.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.models.spec import build_chunks
from megatron_tpt.rl.objectives import ValueObjective
from megatron_tpt.training.checkpoint_files import delete_checkpoint, find_damage, finished_checkpoints, step_folder
from megatron_tpt.training.checkpoint_loading import load_weights
from megatron_tpt.training.model import TrainedModel
from megatron_tpt.training.optimizer import build_optimizer, build_schedule, wrap_model
from megatron_tpt.training.trainer import Callback, StepReport, Trainer

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe

_HEAD = "output_layer"
"""The name in GPTModel of what the value head replaces."""


class ValueHead(torch.nn.Module):
    """A row of weights, zeros at first, so that all values are 0; equal on all tensor-parallel ranks. Called as
    Megatron Core calls an output layer."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, *, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=platform.device()))
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]  # Adam's, not Muon's
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: None = None) -> tuple[Tensor, None]:
        """[s, b, h], or this rank's part of the sequence, to fp32 values [s, b, 1] of the whole."""
        if self.sequence_parallel:
            # Every rank computes all values, so its gradient is whole: it is split and not summed.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return torch.nn.functional.linear(hidden.float(), self.weight.float()), None


def add_value_head(gpts: list[GPTModel], *, sequence_parallel: bool) -> None:
    """Replace the output layer, on the pipeline stage that has it."""
    for gpt in gpts:
        if gpt.post_process:
            gpt.output_layer = ValueHead(
                gpt.config.hidden_size, gpt.config.params_dtype, sequence_parallel=sequence_parallel
            )


def build_critic(recipe: "RLRecipe", policy: Trainer) -> Trainer:
    """The critic of a policy, with the weights of training.init_from and without a value head's, or resumed at the
    policy's step. Needs process groups."""
    own = critic_recipe(recipe)
    gpts = build_chunks(own.model, own.parallel, own.training, seed=own.run.seed)
    add_value_head(gpts, sequence_parallel=own.parallel.sequence_parallel)
    if policy.global_step == 0:
        load_weights(recipe.start, gpts, is_wanted=lambda name: not name.startswith(_HEAD))
    chunks = wrap_model(gpts, own)
    optimizer = build_optimizer(chunks, own)
    model = TrainedModel(chunks, optimizer, build_schedule(optimizer, own))
    reporting = ReportCritic(policy)
    objective = ValueObjective(recipe.critic.clip)
    critic = Trainer(own, model, objective, policy.data, [reporting], model_files=policy.model_files)
    follow(critic, policy)
    return critic


def critic_recipe(recipe: "RLRecipe") -> "RLRecipe":
    """The recipe of the critic's own trainer."""
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, output_dir=recipe.run.output_dir / "critic"),
        model=dataclasses.replace(recipe.model, tie_embeddings=False),  # there is no output layer to tie
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=recipe.critic.learning_rate),
    )


def follow(critic: Trainer, policy: Trainer) -> None:
    """Bring the critic to the policy's step, from its checkpoint of that step, where it is at another. Raises UserError
    when there is none, or it is damaged."""
    if critic.global_step == policy.global_step:
        return
    folder = step_folder(critic.checkpoints, policy.global_step)
    damage = find_damage(folder, reads_content=policy.recipe.checkpoint.verify) if folder.is_dir() else ["missing"]
    if damage:
        raise UserError(
            f"{folder} is damaged ({'; '.join(damage[:4])}), so the critic cannot resume at step {policy.global_step}: "
            f"restore it, or delete the policy's checkpoints of this step and later to resume from an earlier one"
        )
    critic.resume(folder)


class ReportCritic(Callback):
    """Writes the critic's metrics beside the policy's, as critic/NAME."""

    def __init__(self, policy: Trainer) -> None:
        self._policy = policy

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.global_step % trainer.recipe.logging.log_interval:
            return
        metrics = trainer.objective.metrics(trainer.named_sums(report.sums))
        named = {f"critic/{name}": value for name, value in metrics.items()}
        self._policy.metrics.write(trainer.global_step, named | {"critic/grad_norm": report.grad_norm})


def save_critic(critic: Trainer, policy: Trainer) -> None:
    """Save the critic, before the policy's checkpoint of the same step: without it that could not be resumed from.
    Raises SaveError on all ranks."""
    folder = step_folder(critic.checkpoints, critic.global_step)
    if platform.is_first_rank():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it saved the policy
    critic.start_saving().finish()
    if critic.recipe.checkpoint.keep_last is not None and platform.is_first_rank():
        delete_unused(critic.checkpoints, policy.checkpoints, folder.name)


def delete_unused(critic: Path, policy: Path, newest: str) -> None:
    """Delete the critic's checkpoints of steps of which the policy has none, but for the one just saved: the policy's,
    which is still to come, may fail again and again, and the run then resumes from its last one."""
    for folder in finished_checkpoints(critic):
        if folder.name != newest and not (policy / folder.name).is_dir():
            delete_checkpoint(folder)
