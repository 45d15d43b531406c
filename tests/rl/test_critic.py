"""The critic's checkpoints are those of the policy's steps."""

from pathlib import Path

from megatron_tpt.rl.critic import delete_unused


def test_the_critic_of_every_checkpoint_of_the_policy_is_kept(tmp_path: Path) -> None:
    """Also where several of the policy's checkpoints have failed since."""
    critic, policy = tmp_path / "critic", tmp_path / "policy"
    for step in (2, 4, 6, 8, 10, 12):
        (critic / f"step_{step:08d}").mkdir(parents=True)
    for step in (2, 6):  # one that checkpoint.keep_every keeps, and the last that was saved
        (policy / f"step_{step:08d}").mkdir(parents=True)
    delete_unused(critic, policy, "step_00000010")
    assert sorted(one.name for one in critic.iterdir()) == ["step_00000002", "step_00000006", "step_00000010"]
