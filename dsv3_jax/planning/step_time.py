"""Time of a training step: a roofline for compute and memory, communication, and the pipeline bubble."""

from __future__ import annotations

import dataclasses

from dsv3_jax.accounting.activations import saved_by_block
from dsv3_jax.accounting.flops import matmul_seconds, model_flops, recomputed_flops
from dsv3_jax.parallel import pipeline
from dsv3_jax.planning.communication import Traffic, traffic
from dsv3_jax.planning.memory import parameters_per_device, stage_shares
from dsv3_jax.planning.training_plan import TrainingPlan
from dsv3_jax.runtime import Runtime


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest device, at the hardware's efficiency.

    matmuls: at the peak rate of their operands. elementwise: memory traffic between matmuls.
    optimizer: the update, and gradient accumulation over microbatches. exchange: communication that isn't hidden.
    bubble: idle time of a pipeline. hidden: communication behind compute, not part of the total.
    model_flops: the whole step's, without recomputation. traffic: by axis.
    """

    matmuls: float
    elementwise: float
    optimizer: float
    exchange: float
    bubble: float
    hidden: float
    model_flops: float
    executed_flops: float
    tokens: int
    devices: int
    peak: float
    traffic: tuple[Traffic, ...]

    @property
    def total(self) -> float:
        return self.matmuls + self.elementwise + self.optimizer + self.exchange + self.bubble

    @property
    def tokens_per_device_second(self) -> float:
        return self.tokens / self.total / self.devices

    @property
    def flops_per_device_second(self) -> float:
        """Sustained model FLOP/s per device."""
        return self.model_flops / self.total / self.devices

    @property
    def mfu(self) -> float:
        """Fraction of the bfloat16 peak, whatever the precision."""
        return self.flops_per_device_second / self.peak


def elementwise_bytes(plan: TrainingPlan) -> float:
    """Bytes moved per token between matmuls, summed over blocks.

    The activations saved without rematerialisation stand for the tensors between matmuls: each is written and read in
    the forward pass, its gradient is written and read in the backward pass, and recomputation repeats the former.
    """
    c, runtime = plan.config, Runtime(dtype="bfloat16", remat="none", experts_impl=plan.experts_impl)
    moe = c.num_moe_layers + (c.num_nextn_predict_layers if plan.mtp else 0)
    per_token = moe * saved_by_block(c, runtime, True).per_token if moe else 0.0
    if c.num_dense_layers:
        per_token += c.num_dense_layers * saved_by_block(c, runtime, False).per_token
    return per_token * (4 if plan.remat == "none" else 6)


def step_time(plan: TrainingPlan, efficiency: float | None = None) -> StepTime:
    """Predicts a step. `efficiency` overrides that of the hardware family."""
    m, sheet = plan.mesh, plan.hardware
    e = sheet.efficiency if efficiency is None else efficiency
    further = plan.config.num_nextn_predict_layers if plan.mtp and m.stage > 1 else 0
    blocks = [s.dense + s.moe + (further if s.ends else 0) for s in stage_shares(plan)]
    imbalance = max(blocks) * m.stage / sum(blocks)
    tokens = plan.tokens / m.devices * imbalance  # a device's, counted as if it held all layers

    useful = model_flops(plan.config, plan.length, mtp=plan.mtp)
    executed = useful + recomputed_flops(plan.config, plan.length, plan.remat, mtp=plan.mtp)
    matmuls = tokens * matmul_seconds(executed, sheet.peak("bf16"), sheet.peak(plan.precision)) / e
    elementwise = tokens * elementwise_bytes(plan) / sheet.bandwidth / e

    plain, routed = max((parameters_per_device(plan, s) for s in stage_shares(plan)), key=sum)
    state = plain / (m.data * m.expert_parallel) + routed / m.data if plan.zero1 else plain + routed
    update = 2 * plan.stored + 4 * plan.moment + plan.gradient
    accumulate = 2 * plan.gradient * (plain + routed) * plan.microbatches
    optimizer = (state * update + accumulate) / sheet.bandwidth / e

    links = tuple(traffic(plan))
    compute = matmuls + elementwise
    hidden = sum(t.seconds for t in links if t.hidden) / e
    exchange = sum(t.seconds for t in links if not t.hidden) / e + max(0.0, hidden - compute)
    return StepTime(
        matmuls=matmuls,
        elementwise=elementwise,
        optimizer=optimizer,
        exchange=exchange,
        bubble=(compute + exchange) * bubble(plan),
        hidden=min(hidden, compute),
        model_flops=useful.total * plan.tokens,
        executed_flops=executed.total * plan.tokens,
        tokens=plan.tokens,
        devices=m.devices,
        peak=sheet.peak("bf16"),
        traffic=links,
    )


def bubble(plan: TrainingPlan) -> float:
    """Ratio of a pipeline's idle time to its busy time.

    1F1B idles for stage - 1 passes (forward and backward), zero_bubble for two thirds of that, as `parallel.pipeline`
    counts it. DualPipe for stage / 2 - 1 times the passes F&B + B - 3 W of the report's table 2: with F : B : W as
    1 : 2 : 1 and F&B as 3, two thirds of a pass.
    """
    if plan.pipeline_schedule == "dualpipe":
        return max(0.0, plan.mesh.stage / 2 - 1) * 2 / 3 / plan.microbatches
    idle = pipeline.bubble(plan.pipeline_schedule, plan.mesh.stage, plan.microbatches)
    return idle / (1 - idle)
