"""A model on this rank: the chunks that Megatron Core's schedules run, and operations on all of them.

A `Model` only runs forward, such as a frozen reference; a `TrainedModel` has an optimizer. A process can hold several.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_tpt import platform
from megatron_tpt.errors import UserError
from megatron_tpt.objectives.objective import MicroBatch, Needs, Objective
from megatron_tpt.objectives.vocab_parallel import token_statistics
from megatron_tpt.training.batches import Batch
from megatron_tpt.training.optimizer import current_learning_rate
from megatron_tpt.training.steps import (
    Report,
    attention_takes_mask,
    broadcast_from_last_stage,
    compute_sums,
    run_microbatches,
)
from megatron_tpt.training.stragglers import OwnWork

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


class Model:
    """This rank's part of a model: one chunk, or several under interleaved pipeline parallelism."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = list(chunks)

    @property
    def gpts(self) -> list[GPTModel]:
        """The chunks without their wrappers."""
        return [next(part for part in chunk.modules() if isinstance(part, GPTModel)) for chunk in self.chunks]

    @property
    def takes_branches(self) -> bool:
        """Whether rows can have branches (branches.py)."""
        return attention_takes_mask(self.chunks[0])

    def gather_weights(self) -> None:
        """Bring this rank's weights up to date. All ranks call it."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Disable gradients and dropout for one `with` block. All ranks enter it."""
        self.gather_weights()
        was_training = [chunk.training for chunk in self.chunks]
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            yield
        for chunk, training in zip(self.chunks, was_training, strict=True):
            chunk.train(training)

    def evaluate(self, batch: Batch, objective: Objective) -> torch.Tensor:
        """This rank's sums of an objective, [num_sums], without gradients; zeros on all but the last stage. All ranks
        call it."""
        with self.evaluating():
            return compute_sums(self.chunks, batch, objective, forward_only=True)

    def log_probabilities(self, batch: Batch) -> torch.Tensor:
        """Log-probability of every label given the tokens before it, in nats: fp32 [num_samples, s], in the order of
        the samples of this rank's batch, on all tensor- and pipeline-parallel ranks. All ranks call it."""
        return self.predictions(batch, "token_losses", lambda labels, losses: -losses)[0]

    def token_statistics(self, batch: Batch, vocab_size: int, temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of every label, and entropy of the distribution over the `vocab_size` tokens that it is drawn
        from at a temperature, in nats: fp32 [2, num_samples, s], under the terms of `log_probabilities`."""

        def statistics(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            tempered = logits if temperature == 1 else logits / temperature
            found = token_statistics(tempered, labels.view(logits.shape[:-1]), vocab_size)
            return torch.stack([found.log_probabilities, found.entropies])

        return self.predictions(batch, "logits", statistics, num_values=2)

    def predictions(
        self,
        batch: Batch,
        needs: Needs,
        compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        num_values: int = 1,
    ) -> torch.Tensor:
        """What `compute` makes of every label: fp32 [num_values, num_samples, s], under the terms of
        `log_probabilities`. It is given labels [b, s] and outputs of the model, and returns a value for each label, or
        `num_values` of them along a new first dimension."""
        if parallel_state.get_context_parallel_world_size() > 1:
            raise UserError("log-probabilities are not supported with parallel.context_parallel_size > 1: set it to 1")

        def keep(microbatch: MicroBatch, outputs: torch.Tensor) -> Report:
            labels = microbatch["labels"]
            kept = compute(labels, outputs).float().reshape(num_values, *labels.shape)
            return kept.sum(), torch.ones((), dtype=torch.int, device=kept.device), kept

        with self.evaluating():
            parts = run_microbatches(self.chunks, batch, needs, keep, forward_only=True)
        samples, length = next(iter(batch))["labels"].shape
        values = torch.empty(num_values, len(batch) * samples, length, device=platform.device())
        if parts:
            values = torch.cat(parts, dim=1)
        return broadcast_from_last_stage(values)


class TrainedModel(Model):
    """A model whose chunks have gradient buffers, with its optimizer and learning rate schedule."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
    ) -> None:
        super().__init__(chunks)
        self.optimizer = optimizer
        self.schedule = schedule
        self.own_work = OwnWork(self.chunks)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return current_learning_rate(self.optimizer)

    def forward_backward(self, batch: Batch, objective: Objective) -> torch.Tensor:
        """Compute the gradients of a batch, which replace the previous ones. Returns this rank's sums of the objective,
        [num_sums]. All ranks call it."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return compute_sums(self.chunks, batch, objective)

    def update(self) -> float:
        """Update the weights. Returns the global gradient norm before clipping. All ranks call it."""
        _, grad_norm, _ = self.optimizer.step()
        return float(grad_norm)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Gather the updated weights, for code that reads them between steps: with parallel.overlap_param_gather, only
        the next training step would gather what other data-parallel ranks have updated. Gathers at most once per
        update; the next step then need not gather. All ranks call it."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather and not chunk.ddp_config.use_megatron_fsdp:
                groups = chunk.bucket_groups + chunk.expert_parallel_bucket_groups
                if any(not one.param_gather_dispatched or one.param_gather_handle is not None for one in groups):
                    chunk.start_param_sync(force_sync=True)
