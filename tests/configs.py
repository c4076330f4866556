"""Small configurations that several test files share."""

import dataclasses

from dsv3_jax.config import ModelConfig

SMALL_CHECKPOINT = dataclasses.replace(
    ModelConfig.preset("tiny"),
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    q_lora_rank=20,
    kv_lora_rank=12,
    n_routed_experts=8,
    max_position_embeddings=64,
)
"""For checkpoints on disk: every kind of tensor, in a few kilobytes."""
