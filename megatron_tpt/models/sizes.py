"""Parameters and FLOPs of a model of any family, from the tensors in its configuration. Imports no torch."""

from megatron_tpt.config.model import ModelConfig, Weight
from megatron_tpt.config.parallel import ParallelConfig


def _stage_sizes(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[tuple[Weight, int]]:
    """The tensors on a rank of a pipeline stage (from 0), each with the number of its values over all layers of the
    stage. Tied embeddings are on the first and on the last stage."""
    t, last = parallel.tensor_parallel_size, parallel.pipeline_parallel_size - 1
    copies = {
        "embedding": int(stage == 0),
        "layer": parallel.stage_layers(model.num_layers)[stage],
        "output": int(stage == last),
    }
    return [
        (weight, copies[weight.part] * weight.size // (t if weight.is_split else 1))
        for weight in model.weights()
        if not (weight.is_tied and stage == 0)
    ]


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Parameters on a rank of a pipeline stage (from 0)."""
    return sum(size for _, size in _stage_sizes(model, parallel, stage))


def stage_matrices(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Those of stage_parameters that are in the matrices of the layers, which Muon updates."""
    return sum(size for weight, size in _stage_sizes(model, parallel, stage) if weight.is_layer_matrix)


def model_flops_per_token(model: ModelConfig, sequence_length: int, depth: float | None = None) -> float:
    """Floating-point operations that one token of training needs: forward and backward, no recomputation counted.

    6 per weight of every matrix product (2 forward, 4 backward; PaLM, arXiv 2204.02311, appendix B), the output matrix
    included and the embedding look-up not, plus 6 * sequence_length * heads * head_dim per layer for the two attention
    products under a causal mask (half of the 12 that full attention needs). `depth`: layers that a token passes;
    model.depth when not given.
    """
    depth = model.depth if depth is None else depth
    layer = sum(weight.size for weight in model.weights() if weight.is_layer_matrix)
    output = sum(weight.size for weight in model.weights() if weight.part == "output" and len(weight.shape) == 2)
    attention = sequence_length * model.num_attention_heads * model.kv_channels
    return 6.0 * (depth * layer + output) + 6.0 * depth * attention
