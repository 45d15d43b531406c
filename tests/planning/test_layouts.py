"""tools/plan.py: what it ranks fits and runs, is what the dry run says, and what is dropped is counted."""

import json
import re
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from planned import recipe

from megatron_tpt.config.layout import check_layout
from megatron_tpt.config.load import load_recipe, to_dict
from megatron_tpt.errors import UserError
from megatron_tpt.planning.layouts import Plan, Search, overrides, own_layout, search
from megatron_tpt.planning.machine import GPUS, machine_named
from megatron_tpt.planning.options import PlanOptions
from megatron_tpt.recipes.pretrain import PretrainRecipe
from megatron_tpt.tools.plan import main
from megatron_tpt.training.describe import describe
from megatron_tpt.training.devices import find_device
from megatron_tpt.training.memory import estimate_memory
from megatron_tpt.units import GIB

H100 = machine_named("h100")
ROOT = Path(__file__).parents[2]
NUM_GPUS = 16
# 8 of the 80 layers of Llama-3 70B, with its vocabulary.
MODEL = {
    "num_layers": 8, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64, "num_query_groups": 8,
    "vocab_size": 128256,
}  # fmt: skip
RUN = recipe(model=MODEL, training={"sequence_length": 8192, "global_batch_size": 64, "num_steps": 1000}, tensor=8)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(RUN, NUM_GPUS, H100, 0.85 * H100.memory_bytes)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_dict(RUN)))
    return path


def _plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["tools/plan.py", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_what_is_ranked_runs_fits_and_is_in_order(found: Search) -> None:
    assert len(found.ranked) > 5
    times = [plan.estimate.step_s for plan in found.ranked]
    assert times == sorted(times)
    for plan in found.ranked:
        check_layout(plan.recipe, NUM_GPUS)
        assert plan.estimate.memory.total <= 0.85 * H100.memory_bytes
    splits = [(*plan.weights_split, plan.context) for plan in found.ranked]
    assert len(set(splits)) == len(splits)


def test_the_memory_of_a_layout_is_what_the_dry_run_says(found: Search, recipe_file: Path) -> None:
    for plan in found.ranked[:4]:
        run, _ = load_recipe(PretrainRecipe, [str(recipe_file), *overrides(plan, RUN)])
        assert run == plan.recipe
        stages = estimate_memory(run, run.parallel.data_parallel_size(NUM_GPUS))
        assert plan.estimate.memory == max(stages, key=lambda stage: stage.total)
        text = describe(run, NUM_GPUS, find_device("h100"))
        assert f"memory per rank (estimate)       {plan.estimate.memory.total / GIB:.2f} GiB" in text
        assert f"{plan.estimate.num_microbatches}" in text.partition("micro-batches per step and rank")[2].split()[0]


def test_recomputation_is_used_only_where_memory_needs_it() -> None:
    roomy = search(RUN, NUM_GPUS, H100, 1e15)
    assert {plan.recipe.training.recompute for plan in roomy.ranked} == {"none"} and not roomy.num_too_large
    tight = search(RUN, NUM_GPUS, H100, 0.3 * H100.memory_bytes)
    assert "full" in {plan.recipe.training.recompute for plan in tight.ranked} and tight.num_too_large
    assert tight.ranked[0].estimate.step_s >= roomy.ranked[0].estimate.step_s


def test_the_tool_offers_the_gpus_that_there_are_numbers_of() -> None:
    assert get_args(get_type_hints(PlanOptions)["gpu"]) == GPUS
    for name in GPUS:
        assert machine_named(name).peak("bf16") > 1e14


def test_more_gpus_need_less_time() -> None:
    times = [search(RUN, gpus, H100, 0.85 * H100.memory_bytes).ranked[0].estimate.step_s for gpus in (8, 16, 32)]
    assert times == sorted(times, reverse=True)


def test_where_nothing_fits_the_smallest_need_is_named() -> None:
    with pytest.raises(UserError, match=r"layouts on 8 GPUs fits: the smallest needs \d+\.\d GiB .* allows 1\.0"):
        search(RUN, 8, H100, GIB)
    with pytest.raises(UserError, match=r"no layout is possible on 7 GPUs: training\.global_batch_size"):
        search(RUN, 7, H100, 1e15)


def test_what_the_checks_refuse_is_counted_by_their_field() -> None:
    run = recipe(model=MODEL | {"ffn_hidden_size": 28676}, training={"global_batch_size": 64})
    refusals = search(run, NUM_GPUS, H100, 1e15).refusals
    assert refusals["model.ffn_hidden_size"] > 0, "no multiple of 8"


def test_the_own_layout_is_compared_where_it_runs(found: Search) -> None:
    own = own_layout(RUN, NUM_GPUS, H100)
    assert isinstance(own, Plan) and own.recipe is RUN
    assert own.estimate.step_s >= found.ranked[0].estimate.step_s
    assert "4 processes cannot hold parallel.tensor_parallel_size=8" in str(own_layout(RUN, 4, H100))


def test_the_tool_prints_the_best_and_how_to_run_it(
    recipe_file: Path, found: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = _plan(monkeypatch, capsys, recipe_file, "--gpus", str(NUM_GPUS), "--top", "3")
    lines = output.splitlines()
    assert f"{found.num_considered:,} layouts: " in output and "dropped because they need more than 67.7 of" in output
    [header] = [number for number, line in enumerate(lines) if line.split()[:3] == ["TP", "PP", "VP"]]
    assert [line.split()[0] for line in lines[header + 1 : header + 5]] == ["1", "2", "3", "own"]
    best = found.ranked[0]
    assert f"{best.estimate.step_s:.3f}" in lines[header + 1] and f"{best.estimate.mfu:.1%}" in lines[header + 1]
    assert lines[-1] == " ".join(overrides(best, RUN))


def test_the_page_shows_what_the_tool_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/planning.md").read_text()
    command, output = re.findall(r"^```bash\npython tools/plan.py (.*?)\n```\n\n```text\n(.*?)^```", page, re.M | re.S)[
        0
    ]
    monkeypatch.chdir(ROOT)
    assert _plan(monkeypatch, capsys, *command.split()) == output


def test_json_has_the_same_numbers_and_settings_change_the_recipe(
    recipe_file: Path, found: Search, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [recipe_file, "--gpus", str(NUM_GPUS), "--json"]
    plain = json.loads(_plan(monkeypatch, capsys, *arguments))
    assert plain["layouts"][0]["step_s"] == pytest.approx(found.ranked[0].estimate.step_s)
    assert plain["too_large"] == found.num_too_large and plain["own_layout"] is not None
    fp8 = json.loads(_plan(monkeypatch, capsys, *arguments, "--set", "training.fp8=tensorwise"))
    assert fp8["layouts"][0]["step_s"] < plain["layouts"][0]["step_s"]
    with pytest.raises(UserError, match=r"training\.fp9"):
        _plan(monkeypatch, capsys, *arguments, "--set", "training.fp9=tensorwise")
