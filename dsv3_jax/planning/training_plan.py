"""A training plan: model, hardware, mesh, batch and precision, validated together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from dsv3_jax.accounting.hardware import Hardware
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.parallel.mesh import MeshShape
from dsv3_jax.planning.options import PlannedSchedule, Precision
from dsv3_jax.runtime import Remat, Runtime


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The training step to plan.

    batch: sequences per step, over all devices. microbatch_size: sequences per device at a time.
    precision: dtype of the operands of linear layers; everything else computes in bfloat16.
    stored, gradient, moment: bytes per parameter of the master copy, the gradient, and each of Adam's two moments.
    weight: bytes per parameter of the compute copy, 0 if the master copy is cast on the fly.
    zero1: the optimizer state is sharded over data and expert too. fused_attention: no scores are saved.
    pipeline_schedule: `dualpipe` holds two copies of the weights and fills most of the bubble.
    """

    config: ModelConfig
    hardware: Hardware
    mesh: MeshShape
    batch: int
    length: int = 4096
    microbatch_size: int = 1
    precision: Precision = "bf16"
    remat: Remat = "paper"
    stored: int = 4
    gradient: int = 4
    moment: int = 4
    weight: int = 2
    zero1: bool = True
    fused_attention: bool = True
    pipeline_schedule: PlannedSchedule = "1f1b"
    mtp: bool = True
    experts_impl: Literal["reference", "ragged", "blocked"] = "ragged"

    @property
    def runtime(self) -> Runtime:
        return Runtime(dtype="bfloat16", remat=self.remat, experts_impl=self.experts_impl)

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.length

    @property
    def microbatches(self) -> int:
        """Microbatches per step and device."""
        return self.batch // (self.mesh.replicas * self.microbatch_size)

    @property
    def microbatch_tokens(self) -> int:
        """Tokens per device in a microbatch."""
        return self.microbatch_size * self.length // self.mesh.context

    def __post_init__(self) -> None:
        c, m = self.config, self.mesh
        if self.batch < 1 or self.length < 1 or self.microbatch_size < 1:
            raise ConfigError(
                f"batch {self.batch}, length {self.length}, microbatch_size {self.microbatch_size}: all must be >= 1"
            )
        if self.length > c.max_position_embeddings:
            raise ConfigError(f"length {self.length} exceeds max_position_embeddings ({c.max_position_embeddings})")
        if self.batch % (m.replicas * self.microbatch_size):
            raise ConfigError(
                f"a batch of {self.batch} sequences doesn't divide into microbatches of {self.microbatch_size} on "
                f"data x fsdp x node x expert = {m.replicas} parts"
            )
        if self.length % m.context:
            raise ConfigError(f"length {self.length} doesn't divide over context={m.context}")
        if c.n_routed_experts % m.expert_parallel:
            raise ConfigError(
                f"node x expert = {m.expert_parallel} doesn't divide n_routed_experts ({c.n_routed_experts})"
            )
        if c.num_attention_heads % m.tensor:
            raise ConfigError(f"tensor={m.tensor} doesn't divide num_attention_heads ({c.num_attention_heads})")
        if m.stage > c.num_hidden_layers:
            raise ConfigError(f"stage={m.stage} exceeds num_hidden_layers ({c.num_hidden_layers})")


def meshes(plan: TrainingPlan, devices: int) -> Iterator[TrainingPlan]:
    """Yields `plan` on every valid mesh of `devices`, with tensor up to 8 and no context below 16K tokens."""
    c, sheet = plan.config, plan.hardware
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]

    def small(limit: int) -> list[int]:
        return [d for d in divisors if d <= limit]

    for tensor in small(8):
        for context in small(64) if plan.length >= 16384 else (1,):
            for expert in [d for d in divisors if d == 1 or (c.num_moe_layers and c.n_routed_experts % d == 0)]:
                for stage in small(min(32, c.num_hidden_layers)):
                    inner = tensor * context * expert * stage
                    if devices % inner:
                        continue
                    for fsdp in [d for d in divisors if (devices // inner) % d == 0]:
                        mesh = MeshShape(
                            stage=stage,
                            data=devices // inner // fsdp,
                            fsdp=fsdp,
                            expert=expert,
                            context=context,
                            tensor=tensor,
                        )
                        if sheet.torus_axes == 0 and tensor > sheet.domain:
                            continue
                        try:
                            yield dataclasses.replace(plan, mesh=mesh)
                        except ConfigError:
                            continue
