"""Reinforcement learning with verifiable rewards: the functions between a batch of rollouts and a loss.

Rewards (rewards.py), process rewards (repro.py), advantages (advantages.py), token losses and their aggregation
(losses.py), and the correction of the mismatch of trainer and engine (mismatch.py) are pure functions of tensors. They
do not communicate: those that need a whole batch are given the rollouts of all ranks.
May import every stage, and the packages below; no stage imports it.
"""
