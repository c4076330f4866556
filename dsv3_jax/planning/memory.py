"""Bytes on the fullest device of a training plan."""

from __future__ import annotations

import dataclasses
import functools

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.activations import kept_by_block
from dsv3_jax.planning.mesh import TrainingPlan
from dsv3_jax.planning.parameters import Leaf, leaves

_LOGITS_COPIES = 2
"""Float32 arrays as large as the logits that are alive together: the logits and their gradient."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device.

    weights: master copy and the copy computed with. gradients, moments: the optimizer's. activations: what backward
    keeps. working: the largest of one block's own arrays and the logits. gathered: two whole weights on an fsdp axis.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    working: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def share(leaf: Leaf, plan: TrainingPlan) -> float:
    """The part of a leaf that one device holds, before stages: over fsdp and tensor, routed experts over expert too.

    MLA's down-projections, norms and gates aren't cut over tensor: every head needs all of their outputs.
    """
    m = plan.mesh
    whole = leaf.is_norm or leaf.path[-1] in ("q_a_proj", "kv_a_proj_with_mqa", "eh_proj") or "gate" in leaf.path
    cut = (m.fsdp) * (1 if whole else m.tensor) * (m.expert if leaf.is_routed else 1)
    return 1 / cut


@functools.cache
def _block_leaves(config: ModelConfig) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...], tuple[Leaf, ...], tuple[Leaf, ...]]:
    """Leaves of one dense block, of one sparse block, of all MTP modules, and of the rest."""
    dense, moe, mtp, rest = [], [], [], []
    for leaf in leaves(config):
        if leaf.path[0] in ("dense_layers", "moe_layers"):
            one = dataclasses.replace(leaf, shape=leaf.shape[1:])
            (dense if leaf.path[0] == "dense_layers" else moe).append(one)
        else:
            (mtp if leaf.is_mtp else rest).append(leaf)
    return tuple(dense), tuple(moe), tuple(mtp), tuple(rest)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one pipeline stage holds: blocks of each kind, and embedding, head and MTP if it is the one with them."""

    dense: int
    moe: int
    ends: bool


def stages(plan: TrainingPlan) -> list[Stage]:
    """Blocks spread evenly, dense ones first. Embedding, head and MTP sit on one device of the last stage's.

    MTP modules count as sparse blocks when blocks are spread, so that the last stage gets fewer of the others.
    """
    c, n = plan.config, plan.mesh.stage
    extra = c.num_nextn_predict_layers if plan.mtp else 0
    total = c.num_hidden_layers + extra
    bounds = [round(i * total / n) for i in range(n + 1)]
    result = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        last = min(last, c.num_hidden_layers)
        dense = max(0, min(last, c.num_dense_layers) - first)
        result.append(Stage(dense, max(0, last - first) - dense, last == c.num_hidden_layers))
    return result


def held(plan: TrainingPlan, stage: Stage) -> tuple[float, float]:
    """Parameters that one device of a stage holds: (not routed, routed)."""
    dense, moe, mtp, rest = _block_leaves(plan.config)
    groups = [(dense, stage.dense), (moe, stage.moe)]
    if stage.ends or plan.mesh.stage == 1:
        groups += [(rest, 1)] + ([(mtp, 1)] if plan.mtp else [])
    plain = routed = 0.0
    for group, times in groups:
        for leaf in group:
            size = leaf.size * share(leaf, plan) * times
            if leaf.is_routed:
                routed += size
            else:
                plain += size
    return plain, routed


def memory(plan: TrainingPlan) -> Memory:
    """Memory of the stage that needs most."""
    return max((_stage_memory(plan, s, i) for i, s in enumerate(stages(plan))), key=lambda m: m.total)


def _stage_memory(plan: TrainingPlan, stage: Stage, index: int) -> Memory:
    m, c = plan.mesh, plan.config
    plain, routed = held(plan, stage)
    copies = 2 if plan.schedule == "dualpipe" and m.stage > 1 else 1
    if plan.zero1:
        state = plain / (m.data * m.expert) + routed / m.data
    else:
        state = plain + routed
    # Without a copy to compute with, the master copy is what a device computes with.
    weights = plan.weight * (plain + routed) * copies + plan.stored * (state if plan.weight else plain + routed)
    tokens = plan.microbatch_tokens
    blocks = stage.dense + stage.moe + (c.num_nextn_predict_layers if stage.ends and plan.mtp else 0)
    in_flight = min(plan.microbatches, m.stage - index + (1 if copies == 2 else 0)) if m.stage > 1 else 1
    if copies == 2:
        in_flight = min(plan.microbatches, m.stage + 1)  # both directions: the sum is the same on every stage
    kept, pairs = _activations(plan)
    working, working_pairs = _largest_block(plan)
    if plan.remat == "none":
        working = working_pairs = 0.0
    logits = _LOGITS_COPIES * 4 * c.vocab_size / m.tensor * tokens if stage.ends or m.stage == 1 else 0
    square = 0 if plan.fused_attention else tokens * plan.length / m.tensor
    return Memory(
        weights=weights,
        gradients=plan.gradient * (plain + routed),
        moments=2 * plan.moment * state,
        activations=in_flight * (kept * blocks * tokens + pairs * blocks * square),
        working=max(working * tokens + working_pairs * square, logits),
        gathered=_gathered(plan),
    )


def _activations(plan: TrainingPlan) -> tuple[float, float]:
    """Bytes of a token, and of a query and key, that an average block keeps on one device."""
    c, tensor = plan.config, plan.mesh.tensor
    moe = kept_by_block(c, plan.runtime, True) if c.num_moe_layers else None
    dense = kept_by_block(c, plan.runtime, False) if c.num_dense_layers else None
    of = lambda get: (
        (c.num_moe_layers * (get(moe) if moe else 0) + c.num_dense_layers * (get(dense) if dense else 0))
        / c.num_hidden_layers
    )
    # What is kept per head or per hidden unit is cut over tensor; the residual stream isn't.
    stream = 2 * c.hidden_size
    per_token = of(lambda k: k.per_token)
    return min(per_token, stream) + max(0, per_token - stream) / tensor, of(lambda k: k.per_pair)


def _largest_block(plan: TrainingPlan) -> tuple[float, float]:
    """The arrays that one block makes while it is differentiated."""
    runtime = dataclasses.replace(plan.runtime, remat="none")
    kept = kept_by_block(plan.config, runtime, bool(plan.config.num_moe_layers))
    return kept.per_token / plan.mesh.tensor, kept.per_pair


def _gathered(plan: TrainingPlan) -> float:
    """The largest weight and the next one, gathered over fsdp in bfloat16."""
    if plan.mesh.fsdp == 1:
        return 0.0
    dense, moe, _, rest = _block_leaves(plan.config)
    return 2 * 2 * max(leaf.size * share(leaf, plan) for leaf in dense + moe + rest) * plan.mesh.fsdp
