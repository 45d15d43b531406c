"""What ranks send, against numbers worked out by hand.

The model: 8 layers of width 64, feed-forward width 128, 4 query heads and 2 key-value heads of 16, 256 tokens. A layer
has 2 x 64 (norms) + 128 x 64 (queries, keys, values) + 64 x 64 + 256 x 64 + 64 x 128 = 36,992 parameters. A micro-batch
is one sample of 128 tokens, a step 16 of them.
"""

import pytest
from planned import recipe

from megatron_tpt.planning.communication import traffic
from megatron_tpt.planning.machine import machine_named

H100 = machine_named("h100")
LAYER, TABLE = 36_992, 256 * 64
PARAMETERS = 8 * LAYER + 2 * TABLE + 64
NVLINK, ADAPTER = 0.8 * 450e9, 0.8 * 50e9


def _sent(num_gpus: int, *, gradient_bytes: int = 4, **layout) -> dict[str, float]:
    found = traffic(recipe(**layout), num_gpus, H100, gradient_bytes)
    return {kind: one.num_bytes for kind, one in found.items()}


def test_tensor_parallelism_has_ten_collectives_of_half_the_activations() -> None:
    # 8 layers, 16 micro-batches; each collective sends half of 128 x 64 values of 2 bytes.
    assert _sent(2, tensor=2) == {"tensor": 8 * 16 * 10 * 8_192}
    # Six all-gathers of what is multiplied in FP8, four reduce-scatters in bf16.
    assert _sent(2, tensor=2, training={"fp8": "tensorwise"}) == {"tensor": 8 * 16 * (6 * 4_096 + 4 * 8_192)}


def test_without_sequence_parallelism_there_are_four_all_reduces() -> None:
    assert _sent(4, tensor=4, model={"num_query_groups": 4}, sequence_parallel=False) == {
        "tensor": 8 * 16 * 4 * 2 * 3 / 4 * 16_384
    }


def test_a_ring_of_context_parallelism_passes_keys_and_values_three_times() -> None:
    # 32 tokens of a rank, 2 x 2 x 16 values, to three others; in the backward pass again, and as many gradients.
    assert _sent(4, context=4)["context"] == 8 * 16 * 3 * 3 * 32 * 64 * 2
    # All-to-all: 3/4 of queries, keys, values and outputs (2 x 64 + 64 values), and of their gradients.
    assert _sent(4, context=4, context_parallel_exchange="a2a")["context"] == 8 * 16 * 2 * 3 / 4 * 32 * 192 * 2


def test_a_stage_sends_activations_and_gradients_once_for_each_piece() -> None:
    assert _sent(4, pipeline=4) == {"pipeline": 16 * 2 * 16_384}
    assert _sent(4, pipeline=4, pieces=2) == {"pipeline": 16 * 2 * 2 * 16_384}
    assert _sent(2, pipeline=2) == {"pipeline": 16 * 16_384}, "the first sends activations, the last gradients"
    assert _sent(8, pipeline=4, tensor=2)["pipeline"] == 16 * 2 * 8_192, "split along the sequence"


def test_gradients_are_reduced_and_parameters_gathered_once_a_step() -> None:
    assert _sent(4) == {"data": 3 / 4 * PARAMETERS * (4 + 2)}
    assert _sent(4, gradient_bytes=2) == {"data": 3 / 4 * PARAMETERS * (2 + 2)}
    assert _sent(4, distributed_optimizer=False) == {"data": 3 / 4 * PARAMETERS * (4 + 4)}, "an all-reduce"
    # Two data-parallel ranks on the first stage of two, which has half of the layers and the embedding.
    last = 4 * LAYER + TABLE + 64
    assert _sent(4, pipeline=2)["data"] == 1 / 2 * last * (4 + 2)


def test_fsdp_exchanges_what_it_shards_in_every_micro_batch() -> None:
    assert _sent(4, fsdp="optim_grads") == {"data": 3 / 4 * PARAMETERS * (4 * 4 + 2)}
    assert _sent(4, fsdp="optim_grads_params") == {"data": 3 / 4 * PARAMETERS * 4 * (4 + 2 * 2)}


@pytest.mark.parametrize(
    ("num_gpus", "layout", "links"),
    [
        (8, {"tensor": 2}, {"tensor": NVLINK, "data": NVLINK}),
        # 16 ranks, of which each node has 8: eight adapters, and less than NVLink.
        (16, {}, {"data": 8 * ADAPTER}),
        # Four ranks of the group in a node.
        (16, {"tensor": 2}, {"tensor": NVLINK, "data": 4 * ADAPTER}),
        (64, {"tensor": 2, "context": 4}, {"tensor": NVLINK, "context": NVLINK, "data": 8 // 2 * ADAPTER}),
        # Stages are 8 apart: a rank sends through its own adapter.
        (16, {"pipeline": 2}, {"pipeline": ADAPTER, "data": NVLINK}),
        (16, {"pipeline": 2, "rank_order": "tp-cp-pp-dp"}, {"pipeline": NVLINK, "data": 4 * ADAPTER}),
    ],
)
def test_the_link_is_the_slowest_of_a_group(num_gpus: int, layout: dict, links: dict[str, float]) -> None:
    found = traffic(recipe(training={"global_batch_size": 64}, **layout), num_gpus, H100, 4)
    assert {kind: one.num_bytes / one.seconds for kind, one in found.items()} == pytest.approx(links)
    assert {kind: one.link == "NVLink" for kind, one in found.items()} == {
        kind: bandwidth == NVLINK for kind, bandwidth in links.items()
    }
