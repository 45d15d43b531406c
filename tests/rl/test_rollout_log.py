"""What was sampled survives a kill at any byte, and nothing else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tpt.errors import UserError
from megatron_tpt.rl.experience import Experience, Sample
from megatron_tpt.rl.rollout_log import RolloutLog


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
    found = log.read(5)
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
    log.forget_after(2)
    assert sorted(path.name for path in log.folder.iterdir()) == [
        *(f"iteration_{iteration:08d}.{kind}" for iteration in range(3) for kind in ("json", "jsonl.zst")),
        "notes.txt",
    ]


def test_a_damaged_file_is_named(log: RolloutLog) -> None:
    log.write(0, WAVES[0], {})
    content = log.path(0).read_bytes()
    log.path(0).write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"iteration_00000000\.jsonl\.zst.*make or fetch the file again"):
        log.read(0)


def test_a_line_is_plain_json() -> None:
    one = replace(sample(1), columns={"old": [0.5, -1.25, 3.0]}, cuts=[0, 2], answer_losses=[1.5, 0.25])
    assert Sample(**json.loads(json.dumps(one.to_json()))) == one
