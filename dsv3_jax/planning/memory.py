"""Bytes on the fullest device of a training plan."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from dsv3_jax.accounting.activations import saved_by_block
from dsv3_jax.accounting.parameters import Variable, model_variables
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.logits import PIECE
from dsv3_jax.planning.training_plan import TrainingPlan


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device.

    weights: master copy and compute copy. moments: of the optimizer. activations: saved for the backward pass. working:
    the larger of one block's temporary arrays and the logits. gathered: two all-gathered weights with fsdp.
    """

    weights: float
    gradients: float
    moments: float
    activations: float
    working: float
    gathered: float

    @property
    def total(self) -> float:
        return float(sum(dataclasses.astuple(self)))


def in_one_piece(variable: Variable) -> bool:
    """Whether an array is replicated over `tensor`: MLA's down-projections, norms and gates, which every head needs."""
    return (
        variable.is_norm
        or variable.path[-1] in ("q_a_proj", "kv_a_proj_with_mqa", "eh_proj")
        or "gate" in variable.path
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters of a part of the model: replicated over tensor, sharded over tensor, and of routed experts.

    largest_plain, largest_routed: of the largest single array; the latter includes all experts.
    """

    whole: int
    cut: int
    routed: int
    largest_plain: int
    largest_routed: int


@functools.cache
def _parts(config: ModelConfig) -> dict[str, Sizes]:
    """Sizes of one dense block, one sparse block, all MTP modules, and the rest (embedding, head, final norm)."""
    groups: dict[str, list[Variable]] = {"dense_layers": [], "moe_layers": [], "mtp": [], "rest": []}
    for variable in model_variables(config):
        if variable.path[0] in groups:
            groups[variable.path[0]].append(dataclasses.replace(variable, shape=variable.shape[1:]))
        else:
            groups["mtp" if variable.is_mtp else "rest"].append(variable)
    result = {}
    for name, group in groups.items():
        routed = [x.size for x in group if x.is_routed]
        whole = [x.size for x in group if not x.is_routed and in_one_piece(x)]
        cut = [x.size for x in group if not x.is_routed and not in_one_piece(x)]
        result[name] = Sizes(sum(whole), sum(cut), sum(routed), max(whole + cut, default=0), max(routed, default=0))
    return result


@dataclasses.dataclass(frozen=True)
class StageShare:
    """Blocks of each kind on one pipeline stage; `ends`: whether it also has embedding, head and MTP."""

    dense: int
    moe: int
    ends: bool


def stage_shares(plan: TrainingPlan) -> list[StageShare]:
    """Distributes blocks evenly, dense ones first; embedding, head and MTP are on a device of the last stage.

    MTP modules count as sparse blocks, so that the last stage gets fewer of the others.
    """
    c, n = plan.config, plan.mesh.stage
    extra = c.num_nextn_predict_layers if plan.mtp else 0
    total = c.num_hidden_layers + extra
    bounds = [round(i * total / n) for i in range(n + 1)]
    result = []
    for stage, (first, last) in enumerate(itertools.pairwise(bounds)):
        last = min(last, c.num_hidden_layers)
        dense = max(0, min(last, c.num_dense_layers) - first)
        result.append(StageShare(dense, max(0, last - first) - dense, stage == n - 1))
    return result


def parameters_per_device(plan: TrainingPlan, stage: StageShare) -> tuple[float, float]:
    """Parameters per device of a stage: (not routed, routed experts)."""
    m, parts = plan.mesh, _parts(plan.config)
    held = [(parts["dense_layers"], stage.dense), (parts["moe_layers"], stage.moe)]
    if stage.ends:
        held += [(parts["rest"], 1), (parts["mtp"], 1 if plan.mtp else 0)]
    plain = sum(times * (p.whole + p.cut / m.tensor) for p, times in held)
    routed = sum(times * p.routed for p, times in held)
    return plain / m.fsdp, routed / (m.fsdp * m.tensor * m.expert_parallel)


def memory(plan: TrainingPlan) -> Memory:
    """Memory per device on the stage that needs most."""
    # Of stages with the same share, the first has the most microbatches in flight.
    first = {stage: index for index, stage in reversed(list(enumerate(stage_shares(plan))))}
    per_block = _activations(plan), _largest_block(plan)
    return max((_stage_memory(plan, s, i, *per_block) for s, i in first.items()), key=lambda m: m.total)


def _stage_memory(
    plan: TrainingPlan, stage: StageShare, index: int, saved: tuple[float, float], temporary: tuple[float, float]
) -> Memory:
    """Memory per device of one stage, from `_activations` and `_largest_block`."""
    m, c = plan.mesh, plan.config
    plain, routed = parameters_per_device(plan, stage)
    copies = 2 if plan.pipeline_schedule == "dualpipe" and m.stage > 1 else 1
    state = plain / (m.data * m.expert_parallel) + routed / m.data if plan.zero1 else plain + routed
    # Without a copy to compute with, the master copy is what a device computes with.
    weights = plan.weight * (plain + routed) * copies + plan.stored * (state if plan.weight else plain + routed)
    tokens = plan.microbatch_tokens
    blocks = stage.dense + stage.moe + (c.num_nextn_predict_layers if stage.ends and plan.mtp else 0)
    in_flight = min(plan.microbatches, m.stage - index + (1 if copies == 2 else 0)) if m.stage > 1 else 1
    if copies == 2:
        in_flight = min(plan.microbatches, m.stage + 1)  # both directions: the sum is the same on every stage
    if plan.pipeline_schedule == "zero_bubble":
        in_flight = min(plan.microbatches, 2 * m.stage - 1)  # until the last gradient of weights, on every stage
    (kept, pairs), (working, working_pairs) = saved, temporary
    if plan.remat == "none":
        working = working_pairs = 0.0
    # Float32 logits of every head wait for the backward pass, which then makes the gradient of one; or, where they are
    # many, none wait: there are those of one piece, and their gradient.
    heads, logits = 1 + (c.num_nextn_predict_layers if plan.mtp else 0), c.vocab_size / m.tensor * tokens
    logits = 4 * ((heads + 1) * logits if logits <= PIECE else 2 * PIECE) if stage.ends else 0
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
    """Bytes that an average block saves on one device, per token and per pair of query and key."""
    c, tensor = plan.config, plan.mesh.tensor
    moe = saved_by_block(c, plan.runtime, True) if c.num_moe_layers else None
    dense = saved_by_block(c, plan.runtime, False) if c.num_dense_layers else None
    layers = [(c.num_moe_layers, moe), (c.num_dense_layers, dense)]
    per_token = sum(n * saved.per_token for n, saved in layers if saved) / c.num_hidden_layers
    per_pair = sum(n * saved.per_pair for n, saved in layers if saved) / c.num_hidden_layers
    # Activations per head or per hidden unit are sharded over tensor; the residual stream isn't.
    stream = 2 * c.hidden_size
    return min(per_token, stream) + max(0, per_token - stream) / tensor, per_pair


def _largest_block(plan: TrainingPlan) -> tuple[float, float]:
    """Temporary bytes of one block's backward pass, per token and per pair: its activations and their gradients."""
    runtime = dataclasses.replace(plan.runtime, remat="none")
    kept = saved_by_block(plan.config, runtime, bool(plan.config.num_moe_layers))
    return 2 * kept.per_token / plan.mesh.tensor, 2 * kept.per_pair


def _gathered(plan: TrainingPlan) -> float:
    """Bytes of the two largest weights, all-gathered over fsdp in bfloat16."""
    m, parts = plan.mesh, _parts(plan.config).values()
    if m.fsdp == 1:
        return 0.0
    return 2 * 2 * max(max(p.largest_plain, p.largest_routed / m.expert_parallel) for p in parts) / m.tensor
