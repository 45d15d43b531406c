"""Reinforcement learning with verifiable rewards: the loop, and the functions between rollouts and a loss.

`python -m megatron_tpt.rl` (recipes/rl.py, docs/rl.md) runs the loop (loop.py): waves of rollouts (collecting.py) from
an engine whose weights follow the trainer's (rollouts.py, weights.py), graded (outcomes.py) and logged
(rollout_log.py), scored by forward passes (scoring.py), and made into mini-batches (learning.py).
Rewards (rewards.py), process rewards (repro.py, curves.py), advantages (advantages.py), token losses and their
aggregation (losses.py), and the correction of the mismatch of trainer and engine (mismatch.py) are pure functions, of
tensors but for rewards of texts. They do not communicate: those that need a whole batch are given the rollouts of all
ranks. verl_plugin.py is REPRO for verl's trainer, in verl_process.py: these two alone need verl, and no Megatron Core.
May import every stage, recipes, and the packages below; no stage imports it.
"""
