"""The loop of reinforcement learning: an endless source of batches for the trainer, made of rollouts.

An iteration sends the weights to the engines, samples and grades rollouts (collecting.py), computes what depends on the
weights that wrote them (`Iterations._score`: log-probabilities, values, process rewards, advantages), writes all of it
to the log (rollout_log.py), and yields mini-batches for the trainer's steps. Everything between two steps happens while
the trainer asks for its next batch, so checkpoints, faults, reports and early stops are those of any other training.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.generation import load_tokenizer
from megatron_tpt.rl.advantages import Advantages, outcome_advantages, outcome_rewards
from megatron_tpt.rl.collecting import Collected, Collector, Weights, timed
from megatron_tpt.rl.critic import build_critic, follow, save_critic
from megatron_tpt.rl.engine import OwnEngine
from megatron_tpt.rl.experience import Experience, Sample
from megatron_tpt.rl.learning import MiniBatches
from megatron_tpt.rl.losses import kl_estimates, penalized_rewards
from megatron_tpt.rl.objectives import PolicyObjective
from megatron_tpt.rl.outcomes import Rewarder
from megatron_tpt.rl.prompts import build_prompt_data, read_prompts
from megatron_tpt.rl.reference import Reference
from megatron_tpt.rl.reporting import iteration_metrics
from megatron_tpt.rl.repro import join, process_advantages
from megatron_tpt.rl.rollout_log import RolloutLog
from megatron_tpt.rl.rows import Packer
from megatron_tpt.rl.scoring import Process, ProcessScorer, Scorer
from megatron_tpt.rl.start import engine_folder, engine_options
from megatron_tpt.rl.weights import WholeWeights
from megatron_tpt.training.batches import Batch
from megatron_tpt.training.builder import build_trainer
from megatron_tpt.training.callbacks import SaveCheckpoints, patient
from megatron_tpt.training.phases import phase
from megatron_tpt.training.starts import record_start
from megatron_tpt.training.trainer import Callback, Trainer

if TYPE_CHECKING:
    from megatron_tpt.recipes.rl import RLRecipe

logger = logging.getLogger(__name__)


class PromptsTaken(Callback):
    """The number of prompts that the iterations so far have sampled, which dynamic sampling makes unequal."""

    def __init__(self) -> None:
        self.position = 0

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def train(recipe: "RLRecipe") -> Trainer:
    """Train a policy until `training.num_steps`; the trainer of a finished run. Needs process groups."""
    rewarder = Rewarder(recipe)  # first: it refuses what cannot be graded here
    prompts, taken, callbacks = read_prompts(recipe), PromptsTaken(), recipe.build_callbacks()
    objective = PolicyObjective(recipe.algorithm, recipe.rollouts.temperature, recipe.vocab_size)
    trainer = build_trainer(recipe, build_prompt_data(recipe, prompts), [taken, *callbacks], objective)
    critic = build_critic(recipe, trainer) if recipe.has_critic else None
    for one in callbacks:
        if critic is not None and isinstance(one, SaveCheckpoints):
            one.save_before = functools.partial(save_critic, critic, trainer)
    with rewarder, OwnEngine(engine_options(recipe)) as engine:
        log = RolloutLog(recipe.run.output_dir / "rollouts") if platform.is_first_rank() else None
        collector = Collector(recipe, engine, rewarder, prompts, log)
        iterations = Iterations(recipe, trainer, critic, collector, taken, log)
        record_start(recipe, trainer.global_step)
        trainer.fit(iterations.batches)
    return trainer


class Iterations:
    """The iterations of a run, as batches."""

    def __init__(
        self,
        recipe: "RLRecipe",
        trainer: Trainer,
        critic: Trainer | None,
        collector: Collector,
        taken: PromptsTaken,
        log: RolloutLog | None,
    ) -> None:
        self._recipe, self._trainer, self._critic = recipe, trainer, critic
        self._collector, self._taken, self._log = collector, taken, log
        packer = Packer(recipe)
        self._scorer = Scorer(packer, recipe.vocab_size, recipe.training.global_batch_size)
        self._mini_batches = MiniBatches(recipe, packer)
        self._reference = Reference(recipe, recipe.reference, trainer) if recipe.reference is not None else None
        self._process = None
        if recipe.repro.enabled:
            tokenizer = load_tokenizer(str(engine_folder(recipe)))
            self._process = ProcessScorer(self._scorer, recipe.repro, tokenizer)

    def batches(self) -> Iterator[Batch]:
        """The batches from the trainer's next step on. All ranks call it."""
        trainer, steps = self._trainer, self._recipe.steps_per_iteration
        first_step = trainer.global_step
        if self._critic is not None:
            follow(self._critic, trainer)
        if self._log is not None:
            self._log.begin(self._recipe, first_step, trainer.data.identity(0))
        while True:
            iteration = trainer.global_step // steps
            is_patient = trainer.global_step > first_step  # before, the timeout is long already
            with patient(trainer) if is_patient else contextlib.nullcontext():
                experience = self._experience(iteration)
            while trainer.global_step // steps == iteration:
                yield self._next_batch(experience, iteration)

    def _next_batch(self, experience: Experience, iteration: int) -> Batch:
        step = self._trainer.global_step
        place = step - iteration * self._recipe.steps_per_iteration
        is_skipped = self._trainer.skips(step + 1)
        if self._critic is not None:
            batches = self._mini_batches
            self._critic.step(Batch([], [], 0) if is_skipped else batches.critic(experience, iteration, place, step))
            is_skipped |= iteration < self._recipe.critic.warmup_iterations
        if is_skipped:
            return Batch([], [], 0)
        return self._mini_batches.policy(experience, iteration, place, step)

    def _experience(self, iteration: int) -> Experience:
        """The scored rollouts of an iteration: from the log, or made now."""
        logged = platform.from_first_rank(lambda: self._log.read(iteration) if self._log is not None else None)
        if logged is not None:
            samples, metrics = logged
            _require_columns(self._recipe, samples, iteration)
            self._taken.position = max(self._taken.position, samples[-1].position + 1)
            if self._trainer.global_step == iteration * self._recipe.steps_per_iteration:
                self._trainer.metrics.write(self._trainer.global_step + 1, metrics)
            return Experience.read([one for one in samples if one.is_used])
        if self._trainer.global_step != iteration * self._recipe.steps_per_iteration:
            raise UserError(
                f"{self._recipe.run.output_dir / 'rollouts'} lacks the rollouts of iteration {iteration}, within which "
                f"the run resumes: restore the files, or delete checkpoints to resume where an iteration begins"
            )
        if self._log is not None:
            self._log.note(self._recipe, self._trainer.data.identity(0))
        begin = time.perf_counter()
        collected = self._collector(iteration, self._taken.position, self._weights())
        experience = Experience.collected(collected.used)
        process = self._score(iteration, experience, collected)
        self._taken.position = collected.next_position
        collected.seconds["iteration"] = time.perf_counter() - begin
        metrics = iteration_metrics(experience, collected, process)
        if self._log is not None:
            unused = [one for one in collected.samples if not one.is_used]
            lines = sorted([*experience.lines(), *unused], key=lambda one: (one.position, one.sample))
            self._log.write(iteration, lines, metrics)
        self._trainer.metrics.write(self._trainer.global_step + 1, metrics)
        logger.info(
            f"iteration {iteration}: reward {metrics['reward']:.4f}  accuracy {metrics['accuracy']:.4f}  "
            f"{metrics['response_tokens']:.1f} tokens"
        )
        return experience

    def _weights(self) -> Weights:
        model = self._trainer.model
        model.gather_weights()
        return Weights(
            lambda: WholeWeights(self._recipe.model, model.gpts),
            self._trainer.global_step,
            lambda requests: self._scorer.score_requests(model, requests),
        )

    @phase("scoring of rollouts")
    def _score(self, iteration: int, experience: Experience, collected: Collected) -> Process | None:
        """Compute all columns of an iteration, with the weights that wrote it."""
        columns, model = experience.columns, self._trainer.model
        sequences, temperature = [one.tokens for one in experience.samples], self._recipe.rollouts.temperature
        with timed(collected.seconds, "log_probabilities"):
            columns["old"], columns["entropy"] = self._scorer.statistics(model, sequences, temperature)
            if self._critic is not None:
                columns["value"] = self._scorer.values(self._critic.model, sequences)
            if self._reference is not None:
                reference = self._reference.at(iteration)
                columns["reference"] = self._scorer.statistics(reference, sequences, temperature)[0]
        process = None
        if self._process is not None:
            with timed(collected.seconds, "process"):
                process = self._process(model, experience)
            experience.samples = process.samples
        self._advantages(iteration, experience, process)
        return process

    def _advantages(self, iteration: int, experience: Experience, process: Process | None) -> None:
        """Add the columns of advantages, and of the critic's returns."""
        recipe, columns, mask = self._recipe, experience.columns, experience.mask
        settings = recipe.algorithm
        rewards = outcome_rewards(experience.scores, mask)
        if settings.kl == "reward":
            kl = kl_estimates(columns["old"], columns["reference"], settings.kl_estimator)
            rewards = penalized_rewards(rewards, kl, mask, settings.kl_coefficient)
        found: Advantages = outcome_advantages(
            settings.name,
            rewards,
            mask,
            experience.groups,
            values=columns.get("value"),
            gamma=settings.gamma,
            lam=settings.lam,
        )
        if process is not None:
            of_process = process_advantages(
                settings.name,
                process.curves.rewards,
                mask,
                experience.groups,
                values=columns.get("value"),
                gamma=settings.gamma,
                lam=settings.lam,
                control=recipe.repro.control,
                name=f"{recipe.run.seed}/process rewards/{iteration}",
            )
            columns["process"] = recipe.repro.alpha * of_process
            found = join(found, of_process, recipe.repro.alpha)
        columns["advantage"] = found.advantages
        if found.returns is not None:
            columns["return"] = found.returns


def _require_columns(recipe: "RLRecipe", samples: Sequence[Sample], iteration: int) -> None:
    """Raise UserError where the rollouts of an iteration were scored for another algorithm, which needed less."""
    needed = {"old", "advantage"}
    if recipe.algorithm.kl == "loss":
        needed.add("reference")
    if recipe.has_critic:
        needed |= {"value", "return"}
    used = next(one for one in samples if one.is_used)
    if missing := needed - used.columns.keys():
        raise UserError(
            f"the rollouts of iteration {iteration}, within which the run resumes, were scored without "
            f"{', '.join(sorted(missing))}, which algorithm.name={recipe.algorithm.name} with kl={recipe.algorithm.kl} "
            f"needs: resume with the algorithm of before, or delete checkpoints to resume where an iteration begins"
        )
