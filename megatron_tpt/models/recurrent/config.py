"""The configuration of a recurrent model, and what follows from its depth."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_tpt.config.fields import NonNegativeFloat, NonNegativeInt, PositiveInt
from megatron_tpt.config.model import Activation, Weight
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.config.parallel import ParallelConfig
from megatron_tpt.config.training import TrainingConfig
from megatron_tpt.errors import require
from megatron_tpt.models.gpt.config import GPTConfig
from megatron_tpt.models.recurrent.depth import Curriculum, Depth, Distribution, draw_depth, scheduled

ADAPTER_KEY = "decoder.adapter.weight"
"""Of the matrix that reads states and embeddings, in checkpoints."""
VALIDATION_SEED = 0
"""Of the initial state wherever nothing is trained: in validation, and in exports."""
_SAMPLES = 4096
"""Depths that are drawn to estimate a mean: its standard error is then below 1 %."""
_LARGEST_GROUP = 4
"""The last group of depths by which the loss is reported begins at most at this multiple of the mean."""


@on_change(
    {
        (Effect.REFUSED, Effect.REFUSED): "prelude_layers coda_layers",
        (Effect.WARNED, Effect.WARNED): "state_std",
        (Effect.WARNED, Effect.FREE): """
            mean_recurrences depth_distribution backprop_recurrences depth_curriculum depth_curriculum_steps
            backprop_curriculum backprop_curriculum_steps
        """,
        (Effect.FREE, Effect.FREE): "test_recurrences",
    }
)
@dataclass
class RecurrentConfig(GPTConfig):
    """A transformer of the Llama, Qwen and OLMo-2 families whose middle layers are passed several times."""

    family: str = "recurrent"
    """This family."""
    num_layers: PositiveInt = 3
    """Transformer blocks, each counted once: prelude, recurrent layers and coda."""
    prelude_layers: NonNegativeInt = 1
    """First layers, which turn tokens into the embeddings that every iteration reads."""
    coda_layers: NonNegativeInt = 1
    """Last layers, which turn the last state into logits. The layers in between are recurrent."""
    mean_recurrences: PositiveInt = 4
    """Mean depth in training: iterations over the recurrent layers, at the end of the curriculum."""
    depth_distribution: Distribution = "poisson-lognormal"
    """How the depth of a micro-batch is drawn: 1 + Poisson(rate) with a log-normal rate of this mean (so mean + 1 in
    the mean, as in the authors' code), always the mean, or uniformly from 1 to 2 * mean - 1."""
    backprop_recurrences: PositiveInt = 8
    """Last iterations through which gradients are propagated; never more than the mean depth of the step."""
    depth_curriculum: Curriculum = "constant"
    """How the mean depth rises from 1 to mean_recurrences: not at all, linearly, or slowly first (1 - sqrt(1 - x))."""
    depth_curriculum_steps: NonNegativeInt = 0
    """Steps in which it rises."""
    backprop_curriculum: Curriculum = "constant"
    """How backprop_recurrences is reached, from 1."""
    backprop_curriculum_steps: NonNegativeInt = 0
    """Steps in which that rises."""
    test_recurrences: PositiveInt | None = None
    """Iterations in validation and wherever no depth is given; mean_recurrences when not given."""
    state_std: NonNegativeFloat = 0.008703882797784892
    """Standard deviation of the initial state before it is truncated at three times that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.recurrent_layers >= 1,
            f"model.num_layers={self.num_layers} leaves no recurrent layer between model.prelude_layers="
            f"{self.prelude_layers} and model.coda_layers={self.coda_layers}: lower them",
        )
        for name in ("depth_curriculum", "backprop_curriculum"):
            kind, steps = getattr(self, name), getattr(self, f"{name}_steps")
            require(
                (kind == "constant") == (steps == 0),
                f"model.{name}={kind} and model.{name}_steps={steps} contradict each other: give both, or neither",
            )

    @property
    def recurrent_layers(self) -> int:
        """Layers that are passed several times."""
        return self.num_layers - self.prelude_layers - self.coda_layers

    @property
    def default_recurrences(self) -> int:
        """Iterations where no depth is given."""
        return self.test_recurrences or self.mean_recurrences

    def unrolled_parameters(self, recurrences: int) -> int:
        """Parameters of the layers, those of the recurrent ones counted once per iteration."""
        return self._layer_parameters * (self.prelude_layers + recurrences * self.recurrent_layers + self.coda_layers)

    def block_flops_per_token(self, mean_depth: int) -> float:
        """Training FLOPs of a token as the paper counts them (section 4): 6 per parameter of the layers, 2 in
        iterations without gradient; without attention's products, adapter, embedding and output matrix."""
        with_gradient = min(mean_depth, self.backprop_recurrences)
        passes = self._passes(mean_depth - with_gradient, with_gradient)["layer"]
        return 6.0 * passes * self._layer_parameters

    @property
    def _layer_parameters(self) -> int:
        return sum(weight.size for weight in self.weights() if weight.part == "layer")

    def weights(self) -> list[Weight]:
        h = self.hidden_size
        *others, norm, output = super().weights()
        return [*others, Weight(ADAPTER_KEY, (h, 2 * h), "block"), norm, output]

    def activations(self, sequence_length: int) -> dict[str, Activation]:
        """Those of a GPT's layer, and a layer's share of the inputs of the adapter."""
        adapter = 2 * self.hidden_size * self._largest_backprop / self.activation_layers
        return {**super().activations(sequence_length), "adapter": Activation(round(adapter), is_split=False)}

    @property
    def _largest_backprop(self) -> int:
        return min(self.backprop_recurrences, self.mean_recurrences)

    @property
    def activation_layers(self) -> float:
        return self.prelude_layers + self.recurrent_layers * self._largest_backprop + self.coda_layers

    def _passes(self, without_gradient: float, with_gradient: float) -> dict[str, float]:
        iterations = with_gradient + without_gradient / 3
        layers = self.prelude_layers + self.recurrent_layers * iterations + self.coda_layers
        return {"layer": layers, "block": iterations}

    def passes(self, measured: Mapping[str, float] | None = None) -> dict[str, float]:
        """See ModelConfig.passes. Measured: the metrics of objectives/depth.py."""
        if measured and "depth" in measured:
            return self._passes(measured["depth"] - measured["depth_backprop"], measured["depth_backprop"])
        mean, backprop = self._mean_depths(self._final_step)
        return self._passes(*_expected(self.depth_distribution, mean, backprop))

    def expected_passes(self, num_steps: int) -> dict[str, float]:
        return self._passes(*_mean(self._depth(index * num_steps // _SAMPLES, index) for index in range(_SAMPLES)))

    @property
    def _final_step(self) -> int:
        return max(self.depth_curriculum_steps, self.backprop_curriculum_steps)

    def mean_depth(self, step: int) -> int:
        """The mean depth m of the step that follows `step` others."""
        return scheduled(self.depth_curriculum, self.mean_recurrences, self.depth_curriculum_steps, step)

    def _mean_depths(self, step: int) -> tuple[int, int]:
        """The mean depth, and the iterations through which gradients are propagated."""
        backprop = scheduled(self.backprop_curriculum, self.backprop_recurrences, self.backprop_curriculum_steps, step)
        return self.mean_depth(step), backprop

    def _depth(self, step: int, seed: int) -> Depth:
        return draw_depth(self.depth_distribution, *self._mean_depths(step), seed)

    def draws(self, step: int, seed: int, *, training: bool) -> dict[str, int]:
        """What RecurrentBlock.forward needs, and the mean depth of the step."""
        if not training:
            depth = self.default_recurrences
            return {"recurrences": depth, "backprop": 0, "mean_recurrences": depth, "seed": VALIDATION_SEED}
        depths, mean = self._depth(step, seed), self.mean_depth(step)
        backprop = depths.with_gradient
        return {"recurrences": depths.total, "backprop": backprop, "mean_recurrences": mean, "seed": seed}

    @property
    def depth_limits(self) -> tuple[int, ...]:
        """1, 2, 4, 8, ..."""
        largest = _LARGEST_GROUP * max(self.mean_recurrences, self.default_recurrences)
        return tuple(2**power for power in range(largest.bit_length()))

    def check_layout(self, parallel: ParallelConfig, training: TrainingConfig) -> None:
        for name, other in (("pipeline_parallel_size", 1), ("context_parallel_size", 1), ("fsdp", "none")):
            value = getattr(parallel, name)
            require(
                value == other,
                f"parallel.{name}={value} is not supported with model.family=recurrent: set it to {other}",
            )
        for name, off in (("fp8", "none"), ("cpu_offload_layers", 0)):
            value = getattr(training, name)
            require(
                value == off, f"training.{name}={value} is not supported with model.family=recurrent: set it to {off}"
            )
        recomputes_weights = training.recompute == "selective" and "mlp" in training.recompute_modules
        require(
            not (recomputes_weights and parallel.overlap_grad_reduce),
            "training.recompute_modules with mlp is not supported with model.family=recurrent and "
            "parallel.overlap_grad_reduce: give training.recompute=full, or turn the overlap off",
        )
        require(
            not (self.hidden_dropout or self.attention_dropout) or training.recompute in ("none", "selective"),
            f"training.recompute={training.recompute} is not supported with model.family=recurrent and dropout: set "
            f"model.hidden_dropout and model.attention_dropout to 0",
        )


@functools.cache  # a planner asks for every layout
def _expected(distribution: Distribution, mean_depth: int, backprop: int) -> tuple[float, float]:
    return _mean(draw_depth(distribution, mean_depth, backprop, seed) for seed in range(_SAMPLES))


def _mean(depths: Iterable[Depth]) -> tuple[float, float]:
    totals, count = [0, 0], 0
    for depth in depths:
        totals, count = [totals[0] + depth.without_gradient, totals[1] + depth.with_gradient], count + 1
    return totals[0] / count, totals[1] / count
