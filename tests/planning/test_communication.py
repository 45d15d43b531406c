"""What ranks send, against numbers worked out by hand.

The model: 8 layers of width 64, feed-forward width 128, 4 query heads and 2 key-value heads of 16, 256 tokens. A layer
has 2 x 64 (norms) + 128 x 64 (queries, keys, values) + 64 x 64 + 256 x 64 + 64 x 128 = 36,992 parameters. A micro-batch
is one sample of 128 tokens, a step 16 of them.
"""

import dataclasses

import pytest
from planned import recipe

from megatron_tpt.planning.communication import traffic
from megatron_tpt.planning.machine import Latencies, machine_named

H100 = machine_named("h100")
WITHOUT_LATENCY = dataclasses.replace(H100, latencies=Latencies(0, 0, 0))
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
        # A ring of context parallelism's own: the last rank of a node sends to the next node through its own adapter.
        (16, {"tensor": 2, "context": 8}, {"tensor": NVLINK, "context": ADAPTER, "data": 4 * ADAPTER}),
        (
            16,
            {"tensor": 2, "context": 8, "context_parallel_exchange": "all_gather"},
            {"tensor": NVLINK, "context": 4 * ADAPTER, "data": 4 * ADAPTER},
        ),
    ],
)
def test_the_link_is_the_slowest_of_a_group(num_gpus: int, layout: dict, links: dict[str, float]) -> None:
    found = traffic(recipe(training={"global_batch_size": 64}, **layout), num_gpus, WITHOUT_LATENCY, 4)
    assert {kind: one.num_bytes / one.seconds for kind, one in found.items()} == pytest.approx(links)
    assert {kind: one.link == "NVLink" for kind, one in found.items()} == {
        kind: bandwidth == NVLINK for kind, bandwidth in links.items()
    }


def _messages(num_gpus: int, **layout) -> dict[str, float]:
    found = traffic(recipe(**layout), num_gpus, H100, 4)
    return {kind: one.num_messages for kind, one in found.items()}


def test_what_is_sent_is_counted_in_messages() -> None:
    assert _messages(2, tensor=2) == {"tensor": 8 * 16 * 10}
    assert _messages(2, tensor=2, sequence_parallel=False) == {"tensor": 8 * 16 * 4 * 2}, "four all-reduces"
    assert _messages(4, context=4)["context"] == 8 * 16 * 3 * 3
    assert _messages(4, context=4, context_parallel_exchange="all_gather")["context"] == 8 * 16 * 3 * 2
    assert _messages(4, pipeline=4, pieces=2) == {"pipeline": 16 * 2 * 2}
    assert _messages(2, pipeline=2) == {"pipeline": 16}
    # Four micro-batches, in each a reduction and two gathers of eight layers and the rest.
    assert _messages(4, fsdp="optim_grads_params") == {"data": 4 * 3 * 9}


def test_gradients_and_parameters_are_sent_in_megatrons_buckets() -> None:
    # A layer has 2 x 4096 + 4096 x 6144 + 4096 x 4096 + 3 x 4096 x 14336 = 218,112,000 parameters, and the model
    # 8 of them + 2 x 256 x 4096 + 4096 = 1,746,997,248: 44 buckets of 40 million, or 14 of 128 million on 128 ranks.
    large = {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8}
    layout = {"model": large, "training": {"global_batch_size": 128}}
    assert _messages(4, overlap_grad_reduce=True, **layout) == {"data": 2 * 44}
    assert _messages(128, overlap_grad_reduce=True, **layout) == {"data": 2 * 14}
    assert _messages(4, **layout) == {"data": 2}, "without overlap all at once"


@pytest.mark.parametrize(
    ("num_gpus", "layout", "kind", "latency_us"),
    [
        (8, {}, "data", 8.4 + 7 * 3.4),
        (16, {}, "data", 8.4 + 14 * 3.4 + 14),  # around two nodes
        (64, {"tensor": 2}, "data", 8.4 + (31 - 7) * 3.4 + 7 * 14),  # four ranks in each of eight nodes
        (8, {"pipeline": 4}, "pipeline", 8.4 + 3.4),
        (16, {"pipeline": 2}, "pipeline", 8.4 + 14),
    ],
)
def test_every_message_has_the_latency_of_its_way(num_gpus: int, layout: dict, kind: str, latency_us: float) -> None:
    run = recipe(training={"global_batch_size": 64}, **layout)
    sent, without = (traffic(run, num_gpus, machine, 4)[kind] for machine in (H100, WITHOUT_LATENCY))
    assert sent.seconds - without.seconds == pytest.approx(sent.num_messages * latency_us * 1e-6)
