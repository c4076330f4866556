"""Bytes received per device in a training step, by mesh axis, and the time that they take."""

from __future__ import annotations

import dataclasses
import math

from dsv3_jax.accounting.hardware import Hardware
from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import AXES, MeshShape
from dsv3_jax.planning.memory import parameters_per_device, stage_shares
from dsv3_jax.planning.training_plan import TrainingPlan


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic along one axis per step. received: bytes per device. seconds: at data-sheet rates. hidden: by compute."""

    axis: str
    what: str
    received: float
    seconds: float
    hidden: bool


def ring(size: int) -> float:
    """Fraction of an array that a device receives when the array is gathered or reduced over `size` devices."""
    return (size - 1) / size


def rate(sheet: Hardware, mesh: MeshShape, axis: str) -> float:
    """Bandwidth in bytes/s per device in a gather or reduction over an axis.

    Behind switches: that of the fast links if the axis and those inside it fit into a node, otherwise of the network.
    On a torus: of the dimensions that the axis fills, assumed from its share of the mesh, at least one.
    """
    inner = AXES[AXES.index(axis) :]
    span = math.prod(getattr(mesh, name) for name in inner)
    if span > sheet.domain:
        return sheet.network
    if not sheet.torus_axes:
        return sheet.links
    filled = math.log(getattr(mesh, axis)) / math.log(mesh.devices) if mesh.devices > 1 else 1
    return sheet.links * max(filled, 1 / sheet.torus_axes)


def exchange_seconds(sheet: Hardware, config: ModelConfig, mesh: MeshShape, tokens: float, per_copy: float) -> float:
    """Seconds to send each of a device's `tokens` to the devices of its experts, at `per_copy` bytes each.

    Behind switches a token is sent to each node once and forwarded within it, and routing is limited to `topk_group`
    groups (report section 3.2.2). On a torus each copy travels a quarter of each ring that it crosses.
    """
    group, k = mesh.expert_parallel, config.num_experts_per_tok
    if group == 1:
        return 0.0
    if sheet.torus_axes:
        side: float = group ** (1 / sheet.torus_axes)
        hops = max(1.0, sheet.torus_axes * side / 4)
        return tokens * min(k, group) * ring(group) * per_copy * hops / sheet.links
    inside = max(1, sheet.domain // (mesh.tensor * mesh.context))
    nodes = math.ceil(group / inside)
    within = tokens * k * ring(min(group, inside)) * per_copy / sheet.links
    if nodes == 1:
        return within
    return max(within, tokens * nodes_reached(config, nodes) * ring(nodes) * per_copy / sheet.network)


def nodes_reached(config: ModelConfig, nodes: int) -> float:
    """Expected number of nodes with an expert of a token, for K uniform draws, within the limit of routing."""
    drawn = nodes * (1 - (1 - 1 / nodes) ** config.num_experts_per_tok)
    limit = config.topk_group * max(1.0, nodes / config.n_group)
    return min(drawn, limit)


def traffic(plan: TrainingPlan) -> list[Traffic]:
    """Traffic of each mesh axis that has any, on the busiest stage.

    `node` counts as part of `expert`: which of these devices share a node follows from the data sheet.
    """
    c, sheet = plan.config, plan.hardware
    m = dataclasses.replace(plan.mesh, node=1, expert=plan.mesh.expert_parallel)
    busiest = max(stage_shares(plan), key=lambda s: s.dense + s.moe)
    fullest = max(stage_shares(plan), key=lambda s: sum(parameters_per_device(plan, s)))
    passes, tokens = plan.microbatches, plan.microbatch_tokens * plan.microbatches
    width = 2 * c.hidden_size  # bytes of a token's bfloat16 activation
    layers = busiest.dense + busiest.moe
    result: list[Traffic] = []

    def add(axis: str, what: str, received: float, seconds: float | None = None, hidden: bool = True) -> None:
        if getattr(m, axis) > 1:
            taken = received / rate(sheet, m, axis) if seconds is None else seconds
            result.append(Traffic(axis, what, received, taken, hidden))

    plain, routed = parameters_per_device(plan, fullest)
    whole = (plain + routed) * m.fsdp
    add("fsdp", "weights gathered twice and gradients scattered, every pass", 3 * 2 * whole * ring(m.fsdp) * passes)
    update = plan.gradient + (plan.weight or plan.stored)
    add("data", "gradients scattered, new weights gathered", update * (plain + routed) * ring(m.data))
    again = 0 if plan.remat == "none" else 1
    # Four sums over tensor: after attention and feed-forward, forward and backward; those recomputed once more.
    add("tensor", "activations summed", (4 + 2 * again) * 2 * width * ring(m.tensor) * tokens * layers, hidden=False)
    latent = 2 * (c.kv_lora_rank + c.qk_rope_head_dim) * tokens * (m.context - 1) * layers
    add("context", "latents gathered, their gradients scattered", (2 + again) * latent)
    add("stage", "activations and their gradients", 2 * width * tokens)
    if m.expert_parallel > 1:
        add("expert", "gradients and weights outside the experts", update * plain * ring(m.expert_parallel))
        per_copy = 2 * ((1 if plan.precision == "fp8" else 2) + 2) * c.hidden_size  # dispatch and combine, both ways
        moe = _moe_layers(plan)
        seconds = exchange_seconds(sheet, c, m, tokens * moe, per_copy)
        received = tokens * moe * min(c.num_experts_per_tok, m.expert_parallel) * ring(m.expert_parallel) * per_copy
        add(
            "expert", "tokens to their experts and back", received, seconds, hidden=plan.pipeline_schedule == "dualpipe"
        )
    return result


def _moe_layers(plan: TrainingPlan) -> int:
    """Largest number of sparse layers of any stage, counting MTP modules."""
    extra = plan.config.num_nextn_predict_layers if plan.mtp else 0
    return max(s.moe + (extra if s.ends else 0) for s in stage_shares(plan))
