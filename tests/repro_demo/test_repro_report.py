import json
from pathlib import Path

import pytest
from parcels import LENGTHS
from repro_claims import compare_all, estimate, read_policies
from repro_report import write_repro_report

from megatron_tpt.errors import UserError

SEEDS = (1, 2, 3)
ARMS = {"start": (0.8, 8.0), "GRPO": (0.9, 4.0), "GRPO with length penalty": (0.9, 1.0), "REPRO": (0.9, 2.0)}


def results(folder: Path, seed: int, arms: dict[str, tuple[float, float]] = ARMS) -> Path:
    """With a little noise, other for every seed, arm and problem."""
    policies = []
    for place, (arm, (accuracy, extra)) in enumerate(arms.items()):
        problems = [
            {
                "id": f"{legs} {number}",
                "num_legs": legs,
                "accuracy": accuracy + noise(seed, place, number),
                "extra_tokens": extra + noise(seed, place, number),
                "early": 0.0,
            }
            for legs in LENGTHS
            for number in range(5)
        ]
        curves = [[-2.0 + 0.2 * step for step in range(10)]] * 5
        policies.append({"name": arm, "problems": problems, "curves": curves})
    path = folder / f"{seed}.json"
    path.write_text(json.dumps({"seed": seed, "policies": policies}))
    return path


def noise(seed: int, place: int, number: int) -> float:
    return ((seed * 7 + place * 3 + number * 5) % 11 - 5) / 500


def verdicts(paths: list[Path]) -> dict[tuple[str, str], str]:
    return {(one.other, one.metric): one.verdict for one in compare_all(read_policies(paths)) if one.arm == "REPRO"}


@pytest.mark.parametrize("seeds", [SEEDS, (1,)])
def test_the_figures_decide_what_repro_beats(seeds: tuple[int, ...], tmp_path: Path) -> None:
    found = verdicts([results(tmp_path, seed) for seed in seeds])
    assert found["start", "accuracy"] == found["start", "extra_tokens"] == "beats"
    assert found["GRPO", "accuracy"] == "does not beat" and found["GRPO", "extra_tokens"] == "beats"
    assert found["GRPO with length penalty", "extra_tokens"] == "is beaten by"
    assert not any("shuffled" in other for other, _ in found)


def test_seeds_are_the_sample_where_there_are_several() -> None:
    several, one = estimate([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), estimate([[1.0, 2.0, 3.0]])
    assert several == one and several.mean == 2.0
    assert several.high - several.mean == pytest.approx(4.302653 / 3**0.5)


def test_arms_are_compared_with_the_seeds_that_both_have(tmp_path: Path) -> None:
    paths = [results(tmp_path, 1), results(tmp_path, 2, {"REPRO": (0.9, 2.0)})]
    assert {one.num_seeds for one in compare_all(read_policies(paths))} == {1}


def test_the_report_says_plainly_what_repro_does_not_beat(tmp_path: Path) -> None:
    write_repro_report(tmp_path, [results(tmp_path, seed) for seed in SEEDS])
    page = (tmp_path / "report.md").read_text()
    assert "- **In accuracy, REPRO does not beat: GRPO, GRPO with length penalty.**" in page
    assert "- **In tokens beyond, REPRO is beaten by: GRPO with length penalty.**" in page
    assert "- REPRO against GRPO (3 seeds): accuracy: does not beat it, " in page and "Seeds: 1, 2, 3." in page
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["arms"]["start"]["extra_tokens"]["mean"] == pytest.approx(8.0, abs=0.02)
    assert content["curves"]["REPRO"][9]["mean"] == pytest.approx(-0.2)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="no results of measure_policies"):
        read_policies([tmp_path / "other.json"])
