"""Reinforcement learning with verifiable rewards: rollouts, and the functions between a batch of them and a loss.

Rollouts are sampled by an engine whose weights follow the trainer's (rollouts.py).
Rewards (rewards.py), process rewards (repro.py), advantages (advantages.py), token losses and their aggregation
(losses.py), and the correction of the mismatch of trainer and engine (mismatch.py) are pure functions, of tensors but
for rewards of texts. They do not communicate: those that need a whole batch are given the rollouts of all ranks.
May import every stage, and the packages below; no stage imports it.
"""
