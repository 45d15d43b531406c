"""Reinforcement learning with verifiable rewards, on prompts whose answers are known."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_tpt.config.recipe import Recipe
from megatron_tpt.config.rl import (
    AlgorithmConfig,
    CriticConfig,
    PromptDataConfig,
    ReproConfig,
    RewardsConfig,
    RolloutsConfig,
)
from megatron_tpt.config.rules import Rule
from megatron_tpt.config.yaml_file import Key
from megatron_tpt.errors import UserError, require
from megatron_tpt.indexing.manifest import TokenizerInfo
from megatron_tpt.names import counted
from megatron_tpt.recipes.base import NO_DATA, DataIdentity, TrainingRecipe, read_tokenizer_info
from megatron_tpt.training.outcome import describe_outcome, evaluate_command

if TYPE_CHECKING:  # these import torch, or take time
    from megatron_tpt.evaluation.problems import Problem
    from megatron_tpt.training.data import TrainingData
    from megatron_tpt.training.trainer import Trainer


_GPU_MEMORY = 0.92
"""The share of a GPU's memory that vLLM takes by default."""


def _where(section: str, names: str, applies: Callable[[Any], bool], needs: str) -> Rule:
    return Rule(section, tuple(names.split()), applies, needs)


_RULES = (
    _where("data", "num_workers", lambda recipe: False, "another kind of run: batches are made of rollouts"),
    _where(
        "data",
        "allow_unsandboxed_code",
        lambda recipe: recipe.data.answer_type == "code",
        "data.answer_type=code",
    ),
    _where("algorithm", "lam", lambda recipe: recipe.has_critic, "algorithm.name=ppo"),
    _where(
        "algorithm",
        "gamma",
        lambda recipe: recipe.has_critic or recipe.algorithm.name == "reinforce_plus_plus" or recipe.repro.enabled,
        "algorithm.name=ppo or reinforce_plus_plus, or repro.enabled=true",
    ),
    _where(
        "algorithm",
        "kl_coefficient kl_estimator reference reference_refresh",
        lambda recipe: recipe.algorithm.kl != "none",
        "algorithm.kl=loss or reward",
    ),
    _where(
        "algorithm",
        "mismatch_level mismatch_upper",
        lambda recipe: recipe.algorithm.mismatch != "none",
        "algorithm.mismatch=truncate or mask",
    ),
    _where(
        "algorithm", "mismatch_lower", lambda recipe: recipe.algorithm.mismatch == "mask", "algorithm.mismatch=mask"
    ),
    _where("rollouts", "endpoints", lambda recipe: recipe.rollouts.engine == "endpoint", "rollouts.engine=endpoint"),
    _where(
        "rollouts",
        "weight_transfer patience_s gpu_memory",
        lambda recipe: recipe.rollouts.has_servers,
        "rollouts.engine=vllm-server or endpoint",
    ),
    _where(
        "rollouts",
        "weights_dir",
        lambda recipe: recipe.rollouts.has_servers and recipe.rollouts.weight_transfer == "folder",
        "servers, and rollouts.weight_transfer=folder",
    ),
    _where("rollouts", "max_waves", lambda recipe: recipe.rollouts.dynamic_sampling, "rollouts.dynamic_sampling=true"),
    _where(
        "rewards", "overlong_factor", lambda recipe: recipe.rewards.overlong_buffer > 0, "a rewards.overlong_buffer"
    ),
    _where(
        "repro",
        "alpha num_segments answer_prefix answer_template first_reward stability_weight control",
        lambda recipe: recipe.repro.enabled,
        "repro.enabled=true",
    ),
    _where(
        "repro",
        "ema_weight",
        lambda recipe: recipe.repro.enabled and recipe.repro.stability_weight > 0,
        "a repro.stability_weight",
    ),
    _where("critic", "learning_rate warmup_iterations clip", lambda recipe: recipe.has_critic, "algorithm.name=ppo"),
)


@dataclass
class RLRecipe(TrainingRecipe):
    """A run of reinforcement learning. A sample is a rollout: training.global_batch_size of them are a step, those of
    rollouts.num_prompts x num_samples an iteration."""

    program = "rl"
    activity = "reinforcement learning"
    needs_start = True
    uncounted = "rollouts, their scoring, PPO's critic and checkpoints"
    rules = (*Recipe.rules, *_RULES)

    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    """Prompts whose answers can be verified."""
    rollouts: RolloutsConfig = field(default_factory=RolloutsConfig)
    """What is sampled, and by which engine."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """The rewards of rollouts."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """How rewards become gradients."""
    repro: ReproConfig = field(default_factory=ReproConfig)
    """Process rewards."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """PPO's critic."""

    @property
    def has_critic(self) -> bool:
        """Whether there is a second model, which predicts returns."""
        return self.algorithm.name == "ppo"

    @property
    def num_rollouts(self) -> int:
        """Rollouts of an iteration."""
        return self.rollouts.num_prompts * self.rollouts.num_samples

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps between two updates of the engine's weights."""
        return self.num_rollouts * self.algorithm.num_epochs // self.training.global_batch_size

    @property
    def most_generated_tokens(self) -> int:
        """See Recipe: if all rollouts are as long as they may be, and none is sampled again."""
        iterations = self.training.num_steps // self.steps_per_iteration
        return iterations * self.num_rollouts * self.rollouts.max_new_tokens

    @property
    def vocab_size(self) -> int:
        """Tokens that are sampled from."""
        assert self.model.vocab_size is not None, "that of the tokenizer, when the recipe gives none"
        return self.model.vocab_size

    @property
    def start(self) -> Path:
        """The checkpoint to start from. Raises UserError when there is none."""
        if self.training.init_from is None:
            raise UserError("training.init_from is empty: give the checkpoint of a model that can solve some prompts")
        return self.training.init_from

    @property
    def reference(self) -> Path | None:
        """The checkpoint of the reference model; None where no divergence is penalized."""
        return (self.algorithm.reference or self.start) if self.algorithm.kl != "none" else None

    @property
    def models_beside(self) -> tuple[int, int]:
        return int(self.algorithm.kl != "none"), int(self.has_critic)

    @property
    def gpu_share(self) -> float:
        if self.rollouts.engine != "vllm-server":
            return 1.0
        return 1 - (_GPU_MEMORY if self.rollouts.gpu_memory is None else self.rollouts.gpu_memory)

    @property
    def tokenizer_path(self) -> Path:
        """That of the checkpoint to start from."""
        return self.start / "tokenizer"

    def resolve(self) -> Self:
        """Also with the reference model, which is compared with that of the checkpoint on resume."""
        recipe = super().resolve()
        if recipe.algorithm.kl == "none" or recipe.algorithm.reference is not None:
            return recipe
        algorithm = dataclasses.replace(recipe.algorithm, reference=recipe.training.init_from)
        return dataclasses.replace(recipe, algorithm=algorithm)

    def check(self, world_size: int) -> None:
        super().check(world_size)
        self._check_model()
        self.check_servers()
        rollouts, size = self.rollouts, self.training.global_batch_size
        require(
            self.num_rollouts % size == 0,
            f"rollouts.num_prompts x num_samples = {self.num_rollouts} rollouts of an iteration are not a multiple of "
            f"training.global_batch_size={size}: change one of them",
        )
        require(
            self.training.num_steps % self.steps_per_iteration == 0,
            f"training.num_steps={self.training.num_steps} is not a multiple of the {self.steps_per_iteration} steps "
            f"of an iteration: change it",
        )
        require(
            rollouts.max_new_tokens < self.training.sequence_length,
            f"rollouts.max_new_tokens={rollouts.max_new_tokens} leaves no room for a prompt in training.sequence_length"
            f"={self.training.sequence_length}: raise that",
        )
        require(
            rollouts.num_samples > 1 or self.algorithm.name in ("ppo", "reinforce_plus_plus"),
            f"rollouts.num_samples=1 gives algorithm.name={self.algorithm.name} nothing to compare a rollout with: "
            f"raise it",
        )
        require(
            rollouts.num_samples > 1 or not rollouts.dynamic_sampling,
            "rollouts.dynamic_sampling=true drops every group of rollouts.num_samples=1: raise it, or turn that off",
        )
        most = rollouts.max_waves * (rollouts.prompts_per_wave or rollouts.num_prompts)
        require(
            not rollouts.dynamic_sampling or most >= rollouts.num_prompts,
            f"rollouts.max_waves={rollouts.max_waves} of prompts_per_wave={rollouts.prompts_per_wave} have {most} "
            f"prompts, and an iteration has num_prompts={rollouts.num_prompts}: raise one of the first two",
        )
        require(
            not (self.repro.enabled and self.data.answer_type == "code"),
            "repro.enabled=true needs a right answer that can be appended, and data.answer_type=code has tests: give "
            "other data",
        )
        require(
            self.rewards.overlong_buffer <= rollouts.max_new_tokens,
            f"rewards.overlong_buffer={self.rewards.overlong_buffer} is more than rollouts.max_new_tokens="
            f"{rollouts.max_new_tokens}: lower it",
        )

    def check_servers(self) -> None:
        """Raise UserError for servers that cannot be asked, or not be sent the weights."""
        from megatron_tpt.generation.request_fields import check_url

        rollouts = self.rollouts
        for url in rollouts.endpoints:
            check_url(url)
        require(
            rollouts.engine != "endpoint" or bool(rollouts.endpoints),
            "rollouts.engine=endpoint needs rollouts.endpoints: the URLs of vLLM servers, such as http://node7:8000/v1",
        )
        for transfer, engine in (("nccl", "endpoint"), ("ipc", "vllm-server")):
            require(
                not rollouts.has_servers or rollouts.weight_transfer != transfer or rollouts.engine == engine,
                f"rollouts.weight_transfer={transfer} is for rollouts.engine={engine}: change one of them",
            )

    def _check_model(self) -> None:
        """Refuse models and layouts whose weights cannot be sent to an engine or whose rollouts cannot be packed, and
        what has no meaning here."""
        for name, unsupported in (
            ("model.family", bool(self.model.depth_limits)),
            ("parallel.fsdp", self.parallel.fsdp != "none"),
            ("parallel.context_parallel_size", self.parallel.context_parallel_size > 1),
            ("training.batch_size_ramp", bool(self.training.batch_size_ramp)),
            ("training.fp8", self.training.fp8 != "none"),
            ("faults.on_loss_spike", self.faults.on_loss_spike != "ignore"),  # the loss of a policy has no scale
        ):
            if unsupported:
                section, _, key = name.partition(".")
                value = getattr(getattr(self, section), key)
                raise UserError(f"{name}={value} is not supported by reinforcement learning: change it")

    def check_data(self) -> None:
        require(bool(self.data.train), NO_DATA)
        require(
            not self.training.validation_interval and not self.data.validation,
            "reinforcement learning does not validate: omit data.validation and training.validation_interval, and "
            "evaluate the checkpoints (tools/evaluate.py)",
        )
        require(
            self.data.tokenizer is None,
            f"data.tokenizer={self.data.tokenizer} is not used: the tokenizer is that of training.init_from; omit it",
        )

    def check_callbacks(self, places: dict[Key, str]) -> None:
        """Also of the functions that add to the reward."""
        super().check_callbacks(places)
        if self.rewards.functions:
            from megatron_tpt.rl.outcomes import reward_functions

            reward_functions(self.rewards.functions)

    def read_tokenizer(self) -> TokenizerInfo | None:
        return read_tokenizer_info(self.tokenizer_path)

    def missing_data(self) -> list[Path]:
        from megatron_tpt.records import expand_sources

        try:
            expand_sources(self.data.train)
        except UserError:
            return [Path(str(self.data.train[0]))]
        return []

    def data_warnings(self) -> Iterator[str]:
        steps, interval = self.steps_per_iteration, self.checkpoint.save_interval
        if interval == 0 or (steps % interval and interval % steps):
            yield (
                f"checkpoint.save_interval={interval}: a run that is interrupted while it samples finds what was "
                f"sampled again where a checkpoint begins the iteration: give a multiple of its {steps} steps"
            )

    @cached_property
    def problems(self) -> list["Problem"]:
        """The rows of data.train, read once."""
        from megatron_tpt.rl.prompts import problems_of

        return problems_of(self)

    def describe_data(self) -> tuple[str, DataIdentity]:
        from megatron_tpt.rl.prompts import check_answers, read_prompts
        from megatron_tpt.rl.start import describe_engine, is_prepared

        check_answers(self)
        prompts = read_prompts(self) if is_prepared(self) else None
        num_prompts = len(self.problems) if prompts is None else len(prompts)
        epochs = self.training.num_steps // self.steps_per_iteration * self.rollouts.num_prompts / num_prompts
        text = f"data.train: {counted(num_prompts, 'prompt')}, read {epochs:.2f} times\n{describe_engine(self)}"
        # What a run has read so far is compared by its tokens, and a new run has read nothing.
        return text, prompts.identity if prompts is not None else lambda num_samples: {}

    def build_data(self) -> "TrainingData":
        from megatron_tpt.rl.prompts import build_prompt_data, read_prompts

        return build_prompt_data(self, read_prompts(self))

    def prepare_data(self) -> None:
        """Check the answers, and export the model to start from for the engines."""
        from megatron_tpt.rl.prompts import check_answers
        from megatron_tpt.rl.start import prepare_engine_folder

        check_answers(self)
        prepare_engine_folder(self)

    def train(self) -> "Trainer":
        from megatron_tpt.rl.loop import train

        return train(self)

    def next_steps(self, num_tokens: int) -> str:
        return "\n".join([describe_outcome(self, num_tokens), evaluate_command(self)])
