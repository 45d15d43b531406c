"""The optimizer's part of a recipe: AdamW or Muon, and the learning rate over the steps."""

from dataclasses import dataclass
from typing import Literal

from megatron_tpt.config.fields import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_bounds,
)
from megatron_tpt.config.on_change import Effect, on_change
from megatron_tpt.errors import require


@on_change(
    {
        (Effect.REFUSED, Effect.FREE): "name",
        (Effect.WARNED, Effect.FREE): """
            learning_rate adam_learning_rate min_learning_rate schedule warmup_steps decay_steps
            wsd_decay_steps wsd_decay_shape weight_decay decay_embeddings adam_beta1 adam_beta2
            adam_epsilon muon_momentum muon_nesterov muon_newton_schulz_steps muon_coefficients muon_scale
            muon_scale_factor muon_split_qkv muon_tensor_parallel muon_matmul_precision clip_grad
        """,
    }
)
@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adam", "muon"] = "adam"
    """AdamW; or Muon for the matrices of the layers, with AdamW for the embedding, the output matrix, norms and
    biases."""
    learning_rate: PositiveFloat = 3e-4
    """Highest learning rate, reached after the warm-up."""
    adam_learning_rate: PositiveFloat | None = None
    """Under Muon, the highest learning rate of what AdamW updates; learning_rate when not given. It warms up and decays
    in proportion to learning_rate."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse-square-root"] = "cosine"
    """Decay after the warm-up; wsd is constant, then a decay over the last wsd_decay_steps; inverse-square-root is
    learning_rate * sqrt(warmup_steps / step), but never below min_learning_rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends; training.num_steps when not given."""
    wsd_decay_steps: PositiveInt | None = None
    """Length of the final decay of the wsd schedule; a tenth of decay_steps when not given."""
    wsd_decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Form of the final decay of the wsd schedule."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; biases and norms are exempt."""
    decay_embeddings: bool = True
    """Whether weight decay acts on the embedding and the output matrix too."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.95
    """Decay of the second moment."""
    adam_epsilon: NonNegativeFloat = 1e-8
    """Added to the root of the second moment."""
    muon_momentum: Decay = 0.95
    """Decay of Muon's mean of gradients."""
    muon_nesterov: bool = True
    """Orthogonalise the mean of gradients after one more step towards the last gradient."""
    muon_newton_schulz_steps: PositiveInt = 5
    """Newton-Schulz iterations that orthogonalise an update."""
    muon_coefficients: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    """Coefficients of the iterations: those of the first Muon for all of them (simple), or a list, one for each."""
    muon_scale: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Factor of an orthogonalised update of a matrix: the root of max(rows, columns), of rows / columns, or of
    max(1, rows / columns)."""
    muon_scale_factor: PositiveFloat = 0.2
    """A further factor of it. 0.2 with spectral scaling gives the updates the size of AdamW's, so that one learning
    rate and weight decay serve both (arXiv 2502.16982, section 2.2); 1.0 suits the other scales."""
    muon_split_qkv: bool = True
    """Orthogonalise the projections to queries, keys and values separately, though they are stored as one matrix;
    those of the gated feed-forward network are always one."""
    muon_tensor_parallel: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    """What is done with matrices that tensor parallelism splits: every rank gathers and orthogonalises the whole, all
    ranks do it together, or each only its own part, which is cheapest but gives a different update for every layout."""
    muon_matmul_precision: Literal["medium", "high", "highest"] = "medium"
    """Precision of the iterations: bf16, TF32 (on GPUs), fp32."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check_bounds(self, "optimizer.")
        require(
            self.min_learning_rate <= self.learning_rate,
            f"optimizer.min_learning_rate={self.min_learning_rate} must be at most optimizer.learning_rate="
            f"{self.learning_rate}",
        )
        require(
            self.adam_learning_rate is None or self.name == "muon",
            "optimizer.adam_learning_rate is for optimizer.name=muon: give learning_rate",
        )
