"""What was sampled survives a kill at any byte, and nothing else."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tpt.config.load import recipe_from_dict
from megatron_tpt.errors import UserError
from megatron_tpt.recipes.rl import RLRecipe
from megatron_tpt.rl.experience import Experience, Sample
from megatron_tpt.rl.rollout_log import RolloutLog
from megatron_tpt.rl.start import prepare_engine_folder


def sample(position: int, number: int = 0, length: int = 3) -> Sample:
    values = torch.randn(length, generator=torch.Generator().manual_seed(position)).tolist()
    return Sample(
        position=position,
        sample=number,
        prompt_id=f"p{position}",
        prompt="how much?",
        prompt_ids=[1, 2],
        text="so much",
        token_ids=list(range(length)),
        log_probabilities=values,
        weight_version=4,
        is_truncated=False,
        answer=["7", 8],
        reason=None,
        rewards={"correct": 1.0, "length": -0.125},
    )


def recipe(**sections: dict[str, Any]) -> RLRecipe:
    """Iterations of two steps."""
    fields: dict[str, dict[str, Any]] = {
        "data": {"train": ["problems.jsonl"]},
        "training": {"num_steps": 8, "global_batch_size": 16},
        "rollouts": {"num_prompts": 4, "num_samples": 8},
    }
    made = recipe_from_dict(RLRecipe, fields | {name: fields.get(name, {}) | one for name, one in sections.items()})
    assert isinstance(made, RLRecipe)
    return made


DATA = {"content of data.train": "sha256:0"}
WAVES = [[sample(0), sample(0, 1, 5)], [sample(1)], [sample(2), sample(2, 1)]]


@pytest.fixture
def log(tmp_path: Path) -> RolloutLog:
    return RolloutLog(tmp_path / "rollouts")


def test_finished_waves_survive_a_kill_at_any_byte(log: RolloutLog) -> None:
    ends = []
    for wave in WAVES:
        log.add_wave(3, wave)
        ends.append(log.waves_path(3).stat().st_size)
    content = log.waves_path(3).read_bytes()
    for size in range(len(content) + 1):
        log.waves_path(3).write_bytes(content[:size])
        kept = sum(end <= size for end in ends)
        assert log.read_waves(3) == WAVES[:kept]
        assert log.waves_path(3).stat().st_size == ([0, *ends][kept]), "the remains are removed"
    log.waves_path(3).write_bytes(content[: ends[1] + 5])
    assert log.read_waves(3) == WAVES[:2]
    log.add_wave(3, WAVES[2])
    assert log.read_waves(3) == WAVES


def test_scored_rollouts_replace_the_waves_and_keep_every_bit(log: RolloutLog) -> None:
    samples = [one for wave in WAVES for one in wave]
    experience = Experience.collected(samples)
    experience.columns["old"] = torch.randn(experience.mask.shape).where(experience.mask, 0)
    log.add_wave(5, samples)
    assert log.read(5) is None
    log.write(5, experience.lines(), {"reward": 0.1 + 0.2})
    assert not log.waves_path(5).exists()
    log.add_wave(5, samples)  # as after a kill before they were removed
    found = log.read(5)
    assert not log.waves_path(5).exists()
    assert found is not None and found[1] == {"reward": 0.1 + 0.2}
    again = Experience.read(found[0])
    assert again.samples == experience.lines()
    assert again.columns.keys() == experience.columns.keys()
    for name, column in experience.columns.items():
        assert torch.equal(again.columns[name], column)
    assert torch.equal(again.mask, experience.mask) and torch.equal(again.groups, torch.tensor([0, 0, 1, 2, 2]))
    assert again.scores.tolist() == [0.875] * 5


def test_what_later_iterations_sampled_is_removed(log: RolloutLog) -> None:
    for iteration in range(4):
        log.write(iteration, WAVES[0], {})
    log.add_wave(4, WAVES[0])
    (log.folder / "notes.txt").write_text("mine")
    log.begin(recipe(), 4, DATA)
    assert files_of(log) == [
        "data.json",
        *(f"iteration_{iteration:08d}.{kind}" for iteration in range(3) for kind in ("json", "jsonl.zst")),
        "notes.txt",
        "recipe.yaml",
    ]


@pytest.mark.parametrize(
    ("changes", "step", "is_kept"),
    [
        ({}, 4, True),
        ({"rollouts": {"max_gap": 0.5}, "optimizer": {"learning_rate": 0.1}}, 4, True),
        ({"rollouts": {"temperature": 0.5}}, 4, False),
        ({"algorithm": {"name": "ppo"}}, 4, False),
        ({"data": {"prompt_template": "{prompt}!"}}, 4, False),
        ({"run": {"seed": 7}}, 4, False),
        ({"rollouts": {"temperature": 0.5}}, 5, True),
    ],
)
def test_what_another_recipe_sampled_is_removed_where_an_iteration_begins(
    log: RolloutLog, changes: dict[str, dict[str, Any]], step: int, is_kept: bool
) -> None:
    """Iteration 2 is steps 4 and 5. Within it, other weights would sample it."""
    log.begin(recipe(), 0, DATA)
    log.write(2, WAVES[0], {})
    log.add_wave(2, WAVES[0])
    log.begin(recipe(**changes), step, DATA)
    assert ("iteration_00000002.jsonl.zst" in files_of(log)) == is_kept
    assert bool(log.read_waves(2)) == is_kept
    log.write(2, WAVES[0], {})
    log.begin(recipe(**changes), step, DATA)
    assert log.read(2) is not None


@pytest.mark.parametrize(("step", "is_kept"), [(4, False), (5, True)])
def test_what_other_data_sampled_is_removed_where_an_iteration_begins(
    log: RolloutLog, step: int, is_kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also before the first checkpoint, which refuses other data. The recipe names the same file."""
    log.begin(recipe(), 0, DATA)
    log.add_wave(2, WAVES[0])
    with caplog.at_level("INFO"):
        log.begin(recipe(), step, {"content of data.train": "sha256:1"})
    line = "iteration 2 is sampled from its beginning: the content of data.train has changed"
    assert (line in caplog.messages) == (not is_kept)
    assert bool(log.read_waves(2)) == is_kept
    log.add_wave(2, WAVES[0])
    log.begin(recipe(), 4, {"content of data.train": "sha256:1"})
    assert bool(log.read_waves(2)) == (not is_kept), "the data of now are noted where an iteration begins"


def test_an_engine_of_another_start_is_refused(tmp_path: Path) -> None:
    """Until there is a checkpoint: with one, its weights count, and the engine gets them."""
    made = recipe(run={"output_dir": str(tmp_path)})
    first, second = (
        dataclasses.replace(made, training=dataclasses.replace(made.training, init_from=tmp_path / name))
        for name in ("first", "second")
    )
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/config.json").write_text("{}")
    RolloutLog(tmp_path / "rollouts").begin(first, 0, DATA)
    prepare_engine_folder(first)
    with pytest.raises(UserError, match=r"engine is of training\.init_from=.*/first, and the recipe has .*/second"):
        prepare_engine_folder(second)
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000002/recipe.yaml").write_text("{}")
    prepare_engine_folder(second)


def files_of(log: RolloutLog) -> list[str]:
    return sorted(path.name for path in log.folder.iterdir())


def test_a_damaged_file_is_named(log: RolloutLog) -> None:
    log.write(0, WAVES[0], {})
    content = log.path(0).read_bytes()
    log.path(0).write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"iteration_00000000\.jsonl\.zst.*make or fetch the file again"):
        log.read(0)


def test_a_line_is_plain_json() -> None:
    one = replace(sample(1), columns={"old": [0.5, -1.25, 3.0]}, cuts=[0, 2], answer_losses=[1.5, 0.25])
    assert Sample(**json.loads(json.dumps(one.to_json()))) == one
