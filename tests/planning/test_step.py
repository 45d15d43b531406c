"""The expected step: exact where it must be, the sum of its parts, and no slower on a better machine."""

import dataclasses

import pytest
from planned import perfect, recipe

from megatron_tpt.errors import UserError
from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.planning.machine import machine_named
from megatron_tpt.planning.step import THIS_PACKAGE, Software, estimate

H100 = machine_named("h100")
LARGE = {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32, "num_query_groups": 8}
LARGE_RUN = {"sequence_length": 8192, "global_batch_size": 64}
RECURRENT = {"family": "recurrent", "prelude_layers": 2, "coda_layers": 2, "mean_recurrences": 4}


@pytest.mark.parametrize("family", [{}, RECURRENT], ids=["gpt", "recurrent"])
def test_a_machine_that_reaches_its_peak_has_an_mfu_of_one(family: dict) -> None:
    run = recipe(model=LARGE | family, training=LARGE_RUN)
    expected = estimate(run, 8, perfect())
    assert expected.mfu == pytest.approx(1.0, rel=1e-9)
    flops = model_flops_per_token(run.model, 8192) * 64 * 8192
    assert expected.step_s == pytest.approx(flops / 8 / 989.4e12)


def test_a_perfect_machine_with_a_pipeline_loses_the_bubble_and_the_unequal_last_stage_alone() -> None:
    run = recipe(model=LARGE, training=LARGE_RUN, pipeline=4)
    expected = estimate(run, 8, perfect())
    # The last of 4 stages has two of 8 layers and the output matrix; 32 micro-batches on each of 2 data-parallel ranks.
    matrices = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 256 * 4096
    per_token = 6 * matrices + 6 * 2 * 8192 * 4096
    assert expected.step_s == pytest.approx((32 + 3) * 8192 * per_token / 989.4e12)


@pytest.mark.parametrize(("pieces", "fraction"), [(1, 3 / 8), (2, 3 / 16)])
def test_the_bubble_is_p_minus_one_over_v_m(pieces: int, fraction: float) -> None:
    run = recipe(training={"global_batch_size": 8}, pipeline=4, pieces=pieces)
    expected = estimate(run, 4, H100)
    assert expected.num_microbatches == 8
    assert expected.bubble_fraction == pytest.approx(fraction)


def test_recomputing_layers_costs_a_third_of_them_and_of_the_feed_forward_network_less() -> None:
    times = {}
    for name, training in {
        "none": {},
        "full": {"recompute": "full"},
        "half": {"recompute": "block", "recompute_layers": 4},
        "mlp": {"recompute": "selective", "recompute_modules": ["mlp"]},
        "attention": {"recompute": "selective", "recompute_modules": ["core_attn"]},
    }.items():
        run = recipe(model=LARGE, training=LARGE_RUN | training)
        times[name] = estimate(run, 8, perfect()).compute_s
    layers = 8 * (6 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 6 * 8192 * 4096) * 8 * 8192 / 989.4e12
    assert times["full"] - times["none"] == pytest.approx(layers / 3)
    assert times["half"] - times["none"] == pytest.approx(layers / 6)
    feed_forward = 8 * 2 * 3 * 4096 * 14336 * 8 * 8192 / 989.4e12
    assert times["mlp"] - times["none"] == pytest.approx(feed_forward)
    attention = 8 * 2 * 8192 * 4096 * 8 * 8192 / 989.4e12
    assert times["attention"] - times["none"] == pytest.approx(attention)


def test_fp8_halves_the_products_of_the_layers_but_not_of_those_left_in_bf16() -> None:
    def seconds(**training) -> float:
        return estimate(recipe(model=LARGE, training=LARGE_RUN | training), 8, perfect()).compute_s

    products = 8 * 6 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) * 8 * 8192 / 989.4e12
    ratio = 989.4 / 1978.9
    assert seconds() - seconds(fp8="tensorwise") == pytest.approx((1 - ratio) * products)
    partly = seconds(fp8="tensorwise", bf16_layers_at_start=1, bf16_layers_at_end=3)
    assert seconds() - partly == pytest.approx((1 - ratio) * products / 2)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 2},
        {"tensor": 2, "pipeline": 2},
        {"pipeline": 4, "pieces": 2},
        {"context": 2, "overlap_grad_reduce": True},
        {"fsdp": "optim_grads_params"},
    ],
)
def test_the_parts_add_up_and_the_throughput_follows(layout: dict) -> None:
    run = recipe(model=LARGE, training=LARGE_RUN, **layout)
    expected = estimate(run, 16, H100)
    parts = [expected.compute_s, *expected.waits_s.values(), expected.bubble_s, expected.optimizer_s]
    assert expected.step_s == pytest.approx(sum(parts)) and min(parts) >= 0
    assert expected.tokens_per_s == pytest.approx(64 * 8192 / expected.step_s)
    assert expected.tokens_per_s_per_gpu == pytest.approx(expected.tokens_per_s / 16)
    assert expected.tflops_per_gpu == pytest.approx(expected.mfu * 989.4)
    assert set(expected.waits_s) == {"tensor", "context", "pipeline", "data"}
    assert all(expected.waits_s[kind] <= sent.seconds for kind, sent in expected.traffic.items())


@pytest.mark.parametrize("layout", [{}, {"tensor": 4, "pipeline": 2}, {"context": 2, "pipeline": 4, "pieces": 2}])
def test_a_better_machine_is_never_slower(layout: dict) -> None:
    run = recipe(model=LARGE, training=LARGE_RUN, **layout)
    before = estimate(run, 16, H100).step_s
    for field in ("memory_bandwidth", "nvlink_bandwidth", "network_bandwidth"):
        better = dataclasses.replace(H100, **{field: 2 * getattr(H100, field)})
        assert estimate(run, 16, better).step_s <= before
    for field in dataclasses.fields(H100.latencies):
        latencies = dataclasses.replace(H100.latencies, **{field.name: 0.0})
        assert estimate(run, 16, dataclasses.replace(H100, latencies=latencies)).step_s <= before
    faster = dataclasses.replace(H100, peak_flops={name: 2 * peak for name, peak in H100.peak_flops.items()})
    assert estimate(run, 16, faster).step_s < before
    for name in dataclasses.fields(H100.shares):
        if name.name != "exposed_tensor":
            value = min(1.0, 1.1 * getattr(H100.shares, name.name))
            shares = dataclasses.replace(H100.shares, **{name.name: value})
            assert estimate(run, 16, dataclasses.replace(H100, shares=shares)).step_s <= before


def test_more_work_takes_longer_and_larger_batches_hide_the_bubble() -> None:
    def expected(batch: int, length: int = 8192):
        training = {"global_batch_size": batch, "sequence_length": length}
        return estimate(recipe(model=LARGE, training=training, pipeline=4), 8, H100)

    small, large, longer = expected(16), expected(64), expected(64, 16384)
    assert large.step_s > small.step_s and longer.step_s > 2 * large.step_s, "attention is quadratic"
    assert large.mfu > small.mfu and large.bubble_fraction < small.bubble_fraction


def test_overlap_hides_what_computation_is_long_enough_for() -> None:
    def waits(software: Software = THIS_PACKAGE, **layout) -> dict[str, float]:
        return estimate(recipe(model=LARGE, training=LARGE_RUN, **layout), 16, H100, software).waits_s

    plain, both = waits(), waits(overlap_grad_reduce=True, overlap_param_gather=True)
    assert 0 == both["data"] < waits(overlap_grad_reduce=True)["data"] < plain["data"]
    # Of ten collectives the four beside a matrix product are hidden without tp_comm_overlap, and half of all with it.
    sent = estimate(recipe(model=LARGE, training=LARGE_RUN, tensor=2), 16, H100).traffic["tensor"].seconds
    assert waits(tensor=2)["tensor"] == pytest.approx(0.6 * sent)
    assert waits(Software(tensor_overlap=True), tensor=2)["tensor"] == pytest.approx(0.5 * sent)
    assert waits(pipeline=4, pieces=2)["pipeline"] == 0 < waits(pipeline=4)["pipeline"]


def test_a_precision_without_a_known_peak_is_refused() -> None:
    with pytest.raises(UserError, match=r"no peak is known of NVIDIA A100-SXM4-80GB in fp8: give training\.dtype"):
        estimate(recipe(model=LARGE, training=LARGE_RUN | {"fp8": "delayed"}), 8, machine_named("a100"))
    with pytest.raises(UserError, match="in fp32"):
        estimate(recipe(training={"dtype": "float32"}), 8, H100)
    with pytest.raises(UserError, match="--gpu=v100 is not known: give one of a100, h100"):
        machine_named("v100")
