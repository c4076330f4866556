"""Reinforcement learning by GRPO: loss, loop, rewards by rule, and the command `grpo`.

The loss plugs into the ordinary training step, and the engine samples with the arrays being trained. Supervised
fine-tuning is an objective of `dsv3_jax.training`.
"""
