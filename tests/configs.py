"""Small configurations that several test files share."""

import dataclasses

from dsv3_jax.config import ModelConfig
from dsv3_jax.runtime import Runtime
from dsv3_jax.training.schedule import Schedule, ScheduleConfig

SMALL = dataclasses.replace(
    ModelConfig.preset("tiny"),
    hidden_size=12,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    vocab_size=17,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    initializer_range=0.5,
    num_nextn_predict_layers=2,
)
"""Every part of the architecture, with widths that differ, for comparison with the equations."""
DOUBLE = Runtime(dtype="float64", param_dtype="float64", experts_impl="blocked")

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

SHARDABLE = dataclasses.replace(
    ModelConfig.preset("tiny"),
    **dict(vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=4),
    **dict(first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8),
    **dict(qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
    **dict(max_position_embeddings=64, initializer_range=0.1, aux_loss_alpha=0.01),
)
"""Every part of the architecture, with widths that divide over eight devices, and weights so large that rounding stays
small beside Adam's epsilon."""
SCHEDULE = Schedule(ScheduleConfig(steps=100, batch_size=8, warmup_steps=1, bias_update_speed=0.01))

KERNEL_SIZES = dataclasses.replace(
    ModelConfig.preset("tiny"),
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    vocab_size=64,
    max_position_embeddings=512,
    initializer_range=0.1,
    num_nextn_predict_layers=1,
)
"""The head widths that the attention kernels support, and small widths otherwise."""

RUN_OPTIONS = [
    *("--model.hidden-size", "16", "--model.intermediate-size", "16", "--model.moe-intermediate-size", "8"),
    *("--model.first-k-dense-replace", "0", "--model.num-hidden-layers", "1"),
    *("--model.n-routed-experts", "4", "--model.num-experts-per-tok", "2"),
    *("--model.n-group", "2", "--model.topk-group", "1", "--model.q-lora-rank", "8", "--model.kv-lora-rank", "8"),
    *("--data.sequence-length", "16", "--schedule.batch-size", "4", "--schedule.steps", "60"),
    *("--log-every", "10", "--validate-every", "30", "--checkpoint-every", "10", "--sample-tokens", "8"),
    *("--validation-batches", "1"),
]
"""Options of `train` for a run of seconds."""
