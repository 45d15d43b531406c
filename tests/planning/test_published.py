"""The simulator against the published figures, and the figures against what their sources say of them themselves."""

import dataclasses
import statistics
from pathlib import Path

import pytest

from megatron_tpt.models.sizes import model_flops_per_token
from megatron_tpt.planning.fit import FITTED, fit
from megatron_tpt.planning.machine import Shares, machine_named
from megatron_tpt.planning.published import TOLERANCE, Published, errors, markdown, rows, sources

PAGE = (Path(__file__).parents[2] / "docs/planning.md").read_text()
# "Throughput in tokens per second" in the pages whose step times the table has.
TOKENS_PER_S = {
    ("dgxc-25.04", "llama3-8b", "bf16"): {8: 85459, 128: 1360683},
    ("dgxc-25.04", "llama3-8b", "fp8"): {8: 112388, 128: 1758618},
    ("dgxc-25.04", "llama3-70b", "bf16"): {64: 71526, 2048: 2288843},
    ("dgxc-25.04", "llama3-70b", "fp8"): {64: 106346, 2048: 3305855},
    ("dgxc-25.02-8b", "llama3-8b", "bf16"): {8: 82028, 128: 1275155},
    ("dgxc-25.02-8b", "llama3-8b", "fp8"): {8: 111054, 128: 1725163},
    ("dgxc-25.02-70b", "llama3-70b", "bf16"): {64: 71756, 2048: 2260623},
    ("dgxc-25.02-70b", "llama3-70b", "fp8"): {64: 100275, 2048: 3053178},
    ("dgxc-25.04", "llama3-405b", "bf16"): {512: 106024, 2048: 422175},
    ("dgxc-25.04", "llama3-405b", "fp8"): {512: 169535, 2048: 667883},
    ("dgxc-25.02-405b", "llama3-405b-gqa16", "bf16"): {576: 117964, 2304: 466527},
    ("dgxc-25.02-405b", "llama3-405b-gqa16", "fp8"): {576: 187671, 2304: 737280},
    ("dgxc-25.05", "llama3-405b", "bf16"): {512: 105863},
    ("dgxc-25.05", "llama3-405b", "fp8"): {512: 161072},
}
# "Model TFLOP / sec / GPU" beside the tokens. Those of Megatron Bridge count causal attention as this package does.
TFLOPS = {
    ("bridge-25.09", "llama3-8b", 8192): 725,
    ("bridge-25.09", "llama3-70b", 8192): 727,
    ("bridge-25.09", "llama3-405b", 8192): 763,
    ("bridge-25.11", "llama3-8b", 8192): 744,
    ("bridge-25.11", "llama3-70b", 8192): 719,
    ("bridge-25.11", "llama3-405b", 8192): 737,
    ("bridge-26.02", "llama3-70b", 8192): 728,
    ("bridge-26.02", "llama3-405b", 8192): 784,
    ("bridge-26.02.01", "llama3-70b", 8192): 736,
    ("bridge-26.04", "llama3-70b", 8192): 734,
    ("bridge-26.04.01", "llama3-405b", 8192): 827,
    ("bridge-26.06", "llama3-405b", 8192): 822,
}
# Those of NeMo count attention without the mask, which is twice as much.
TFLOPS_WITHOUT_MASK = {
    ("nemo-24.07", "llama2-7b", 4096): 780,
    ("nemo-24.07", "llama2-13b", 4096): 760,
    ("nemo-24.07", "llama2-70b", 4096): 768,
    ("nemo-24.07", "llama3-8b", 8192): 711,
    ("nemo-24.07", "llama3-70b", 8192): 734,
} | {
    ("nemo-24.03-long", "llama2-7b", length * 1024): tflops
    for length, tflops in {4: 768, 8: 730, 16: 660, 32: 610, 64: 574, 128: 555, 256: 549, 512: 549, 1024: 536}.items()
}


@pytest.fixture(scope="module")
def found() -> dict[Published, float]:
    return errors()


def _missed(found: dict[Published, float]) -> set[Published]:
    return {row for row, error in found.items() if abs(error) > TOLERANCE}


def test_figures_of_8b_to_405b_that_nothing_is_fitted_to_are_met_within_15_percent(found: dict) -> None:
    met = [row for row in found if not row.fit and row not in _missed(found)]
    assert len(met) >= 40
    for model in ("llama3-8b", "llama3-70b", "llama3-405b", "llama2-7b", "llama2-13b", "llama2-70b"):
        assert [row for row in met if row.model == model]
    for model in ("llama3-8b", "llama3-70b", "llama3-405b"):
        assert {row.precision for row in met if row.model == model} == {"bf16", "fp8"}
    assert statistics.mean(abs(found[row]) for row in met) < 0.05


def test_what_is_missed_are_older_kernels_and_another_program(found: dict) -> None:
    missed = _missed(found)
    assert {row.source for row in missed} == {"nemo-24.03-long", "llama3"}
    assert all(found[row] > 0 for row in missed)


def test_the_page_has_the_table_and_names_what_is_missed(found: dict) -> None:
    assert markdown() in PAGE
    assert f"{len(found) - len(_missed(found))} of {len(found)} figures" in PAGE
    for row in _missed(found):
        assert f"{row.model} | {row.precision} | {row.gpus} | {row.layout} |" in markdown()
    assert markdown().count("missed") == len(_missed(found))


def test_the_constants_are_those_that_the_fit_gives() -> None:
    fitted = fit()
    assert sum(row.fit for row in rows()) == len(FITTED) == 2
    for name in FITTED:
        assert getattr(fitted, name) == pytest.approx(getattr(Shares(), name), abs=0.0006)


@pytest.mark.parametrize("attention", [0.35, 0.55])
def test_what_is_met_does_not_hang_on_the_share_that_attention_is_assumed_to_reach(attention: float) -> None:
    shares = fit(dataclasses.replace(Shares(), attention=attention))
    found = errors(dataclasses.replace(machine_named("h100"), shares=shares))
    assert len(found) - len(_missed(found)) >= 45


def test_step_times_are_copied_as_the_tokens_beside_them_say() -> None:
    for (source, model, precision), figures in TOKENS_PER_S.items():
        for gpus, tokens_per_s in figures.items():
            [row] = [one for one in rows() if (one.source, one.model, one.precision, one.gpus) == (source, model,
                precision, gpus)]  # fmt: skip
            assert row.published * gpus == pytest.approx(tokens_per_s, rel=0.001)
    assert sum(map(len, TOKENS_PER_S.values())) == len([row for row in rows() if row.step_s is not None])


@pytest.mark.parametrize(("figures", "shares"), [(TFLOPS, 1), (TFLOPS_WITHOUT_MASK, 2)], ids=["causal", "full"])
def test_tokens_are_copied_as_the_flops_beside_them_say(figures: dict, shares: int) -> None:
    for key, tflops in figures.items():
        [row] = [
            one for one in rows() if (one.source, one.model, one.length) == key and one.tokens_per_s_per_gpu is not None
        ]
        model = row.recipe().model
        matrices, causal = model_flops_per_token(model, 0), model_flops_per_token(model, row.length)
        flops = matrices + shares * (causal - matrices)
        assert row.published * flops / 1e12 == pytest.approx(tflops, rel=0.01)
    of_sources = [row for row in rows() if row.source in {source for source, _, _ in figures}]
    assert len(figures) == len([row for row in of_sources if row.tokens_per_s_per_gpu is not None])


def test_every_figure_has_a_source_and_is_once() -> None:
    assert {row.source for row in rows()} == set(sources())
    assert len(set(rows())) == len(rows())
    assert all({"title", "url", "date"} == set(source) for source in sources().values())
