"""How long the GPU of a pipeline stage computes for one micro-batch, and for the optimizer: FLOPs and moved bytes.

Matrix products take their FLOPs at the reached share of the peak, and in addition the bytes of their operands and
results at the bandwidth of the memory: small or narrow products are slower, which the sum approximates without a
constant of its own. Everything else moves bytes. docs/planning.md has the formulas.
"""

from dataclasses import dataclass
from typing import Self

from megatron_tpt.config.model import Weight
from megatron_tpt.config.recipe import Recipe
from megatron_tpt.planning.communication import data_ranks, most_parameters
from megatron_tpt.planning.machine import Machine
from megatron_tpt.training.memory import micro_batch_tokens

_VALUE_BYTES = 2
_OPERAND_BYTES = {"bf16": 2, "fp8": 1}
# Both in fp32: gradients are added to a buffer.
_ACCUMULATE_BYTES = 8
# An FP8 operand is read in bf16 and written in FP8 twice, as Hopper needs it transposed for the weights' gradients.
_CAST_BYTES = 4
# Of a logit: read and written in bf16 and in fp32 by the softmax, the loss and the gradient.
_LOGIT_BYTES = 18
# Of a parameter of a rank's share: gradient, main weight and two moments are read in fp32; main weight and moments are
# written, and the weight in bf16. Of every parameter of a rank its gradient is cleared.
_ADAM_BYTES = 16 + 12 + 2
_CLEAR_BYTES = 4


@dataclass(frozen=True)
class PassTime:
    """Seconds of one micro-batch on a rank of a stage, without communication."""

    forward: float
    backward: float
    """Twice the forward pass, and what is recomputed."""
    attention: float
    """Of both: the part in attention's products, which hides the exchange of context parallelism."""

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def times(self, factor: float) -> "PassTime":
        """`factor` times as long."""
        return PassTime(factor * self.forward, factor * self.backward, factor * self.attention)

    def __add__(self, other: Self) -> "PassTime":
        return PassTime(self.forward + other.forward, self.backward + other.backward, self.attention + other.attention)


class Computation:
    """The times of a recipe on a machine."""

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        self.recipe = recipe
        self.machine = machine
        self.tokens = micro_batch_tokens(recipe)
        self.weights = [weight for weight in recipe.model.weights() if len(weight.shape) == 2]
        self.bandwidth = machine.memory_bandwidth * machine.shares.memory

    def matrix(self, weight: Weight, precision: str) -> tuple[float, float]:
        """Seconds forward and backward of one product with a weight: y = x W, then the gradients of x and of W."""
        parallel, tokens = self.recipe.parallel, self.tokens
        rows, columns = map(float, weight.shape)
        # Split along the width that is not the residual stream's; where both are, either.
        if weight.is_split and rows != self.recipe.model.hidden_size:
            rows /= parallel.tensor_parallel_size
        elif weight.is_split:
            columns /= parallel.tensor_parallel_size
        size, widths = rows * columns, rows + columns
        share = self.machine.shares.gemm_fp8 if precision == "fp8" else self.machine.shares.gemm_bf16
        one = 2 * tokens * size / (self.machine.peak(precision) * share)
        operand, cast = _OPERAND_BYTES[precision], _CAST_BYTES if precision == "fp8" else 0
        forward = operand * (tokens * columns + size) + _VALUE_BYTES * tokens * rows + cast * tokens * columns
        backward = operand * (tokens * rows + size + tokens * widths) + cast * tokens * rows
        backward += _VALUE_BYTES * tokens * columns + _ACCUMULATE_BYTES * size
        return one + forward / self.bandwidth, 2 * one + backward / self.bandwidth

    def matrices(self, part: str, precision: str, key: str = "") -> tuple[float, float]:
        """Seconds forward and backward of the products of a part of the model, with all weights or those of a key."""
        weights = (weight for weight in self.weights if weight.part == part and key in weight.key)
        times = [self.matrix(weight, precision) for weight in weights]
        return sum(forward for forward, _ in times), sum(backward for _, backward in times)

    def attention(self) -> tuple[float, float]:
        """Seconds forward and backward of a layer's attention under a causal mask: 6 x length x width FLOPs a token."""
        model, training = self.recipe.model, self.recipe.training
        width = model.num_attention_heads * model.kv_channels / self.recipe.parallel.tensor_parallel_size
        flops = 6 * training.sequence_length * width * self.tokens
        seconds = flops / (self.machine.peak("bf16") * self.machine.shares.attention)
        return seconds / 3, 2 * seconds / 3

    def elementwise(self) -> tuple[float, float]:
        """Seconds forward and backward of a layer's norms, residual sums, rotary positions and gated activation."""
        model, parallel, t = self.recipe.model, self.recipe.parallel, self.recipe.parallel.tensor_parallel_size
        # Two norms read and write the stream, two sums read two and write one.
        stream = 10 * model.hidden_size / (t if parallel.sequence_parallel else 1)
        rotated = 2 * (model.num_attention_heads + model.query_groups) * model.kv_channels / t
        gated = 3 * model.ffn_hidden_size / t
        seconds = _VALUE_BYTES * (stream + rotated + gated) * self.tokens / self.bandwidth
        return seconds, 2 * seconds

    def layer(self, precision: str, *, recompute: str = "none") -> PassTime:
        """One layer; `recompute`: as training.recompute, with "full" for a layer of "block" that is recomputed."""
        attention, others = self.attention(), [self.matrices("layer", precision), self.elementwise()]
        forward = attention[0] + sum(one for one, _ in others)
        again = forward if recompute == "full" else 0.0
        if recompute == "selective":
            modules = self.recipe.training.recompute_modules
            again += attention[0] if "core_attn" in modules else 0.0
            again += self.matrices("layer", precision, ".mlp.")[0] if "mlp" in modules else 0.0
        backward = attention[1] + sum(one for _, one in others) + again
        return PassTime(forward, backward, sum(attention))

    def head(self) -> PassTime:
        """The output matrix, in bf16, and the loss."""
        forward, backward = self.matrices("output", "bf16")
        vocabulary = self.recipe.model.padded_vocab_size / self.recipe.parallel.tensor_parallel_size
        loss = self.tokens * vocabulary * _LOGIT_BYTES / self.bandwidth
        return PassTime(forward + loss / 2, backward + loss / 2, 0.0)

    def stage(self, stage: int) -> PassTime:
        """One micro-batch on a pipeline stage (from 0)."""
        model, parallel, training = self.recipe.model, self.recipe.parallel, self.recipe.training
        layers, last = parallel.stage_layers(model.num_layers)[stage], parallel.pipeline_parallel_size - 1
        passes, precision = model.passes(), training.matmul_precision
        in_bf16 = training.bf16_layers_at_start * (stage == 0) + training.bf16_layers_at_end * (stage == last)
        kind = "full" if training.recompute == "block" else training.recompute
        recomputed = min(layers, training.recompute_layers) if training.recompute == "block" else layers
        # In FP8 or bf16, recomputed or not: in the mean, as it does not matter which layers these are.
        result = PassTime(0.0, 0.0, 0.0)
        for one, of_precision in ((precision, layers - in_bf16), ("bf16", in_bf16)):
            for how, of_kind in ((kind, recomputed), ("none", layers - recomputed)):
                if of_precision and of_kind:
                    share = of_precision * of_kind / layers * passes["layer"] / model.num_layers
                    result += self.layer(one, recompute=how).times(share)
        if stage == 0 and passes["block"]:
            result += PassTime(*self.matrices("block", precision), 0.0).times(passes["block"])
        return result + self.head() if stage == last else result

    def optimizer(self, num_gpus: int) -> float:
        """Seconds of AdamW and of clearing gradients, on the stage with most parameters; the iterations of Muon are not
        counted."""
        parallel, parameters = self.recipe.parallel, most_parameters(self.recipe)
        shards = data_ranks(self.recipe, num_gpus) if parallel.distributed_optimizer else 1
        held = parameters / (shards if parallel.fsdp in ("optim_grads", "optim_grads_params") else 1)
        return (parameters / shards * _ADAM_BYTES + held * _CLEAR_BYTES) / self.bandwidth
