"""A training run of seconds, for what needs a whole one."""

import dataclasses

from dsv3_jax.data import DataConfig
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.training.config import TrainConfig

WIDTHS = dict(
    **dict(hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, q_lora_rank=8),
    **dict(kv_lora_rank=8, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, num_attention_heads=4),
)


def small_config(mesh, sharding, **model):
    """A run of 8 steps, with a checkpoint and metrics at every second."""
    base = TrainConfig.preset("tiny", "cpu")
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **WIDTHS | model),
        runtime=dataclasses.replace(base.runtime, sharding=sharding),
        mesh=MeshShape.parse(mesh),
        data=DataConfig(sequence_length=16),
        schedule=dataclasses.replace(base.schedule, steps=8, batch_size=8, warmup_steps=2),
        log_every=2,
        validate_every=4,
        validation_batches=1,
        checkpoint_every=2,
        sample_tokens=0,
    )
