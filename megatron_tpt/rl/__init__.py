"""Reinforcement learning with verifiable rewards: the functions between a batch of rollouts and a loss.

Rewards (rewards.py), process rewards (repro.py), advantages (advantages.py), token losses and their aggregation
(losses.py), and the correction of what trainer and engine disagree about (mismatch.py). They are pure functions of
tensors: they do not communicate, so those that need a whole batch are given the rollouts of all ranks.
May import every stage, and what is below them; the stages know nothing of it.
"""
